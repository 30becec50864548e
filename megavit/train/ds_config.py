"""The DeepSpeed JSON: read, checked before anything heavy is imported, and resolved for the ranks at hand.
Imports neither torch nor deepspeed.

It stays a plain DeepSpeed file. Four things are ours: a key that the trainer is not tested with is an error
(`ds_keys`), `"bf16": {"enabled": "auto"}` follows the device, accumulation is derived from the global batch,
and gradients are reduced over the data-parallel ranks in float32 unless the file says otherwise.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavit.train.ds_keys import KEYS, SWITCHED_OFF
from megavit.train.ds_rules import shown


def load_ds_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON, in which `overrides` replace or add values by dotted key, as the flags
    `--ds.KEY` do. Raises ValueError with a line for each mistake: the file, the flags if the file alone has
    not got it, the key, the value that it has, and the fix."""
    path, overrides = Path(path), overrides or {}
    repeated: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            for key in found:
                values = [shown(value) for name, value in pairs if name == key]
                if len(values) > 1:
                    repeated.append(
                        f"{shown(key)} is given {len(values)} times ({', '.join(values)}); keep one"
                    )
        return found

    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=build)
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}; save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; a DeepSpeed JSON has four levels at most") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, not {shown(raw)}")
    config = override_ds_config(raw, overrides)
    problems = [*repeated, *ds_config_problems(config)]
    if problems:
        of_the_file = {*repeated, *(ds_config_problems(raw) if overrides else problems)}
        flags = " ".join(f"--ds.{key} {shown(value)}" for key, value in overrides.items())
        raise ValueError(
            "\n".join(
                f"{path}: {problem}" if problem in of_the_file else f"{path} with {flags}: {problem}"
                for problem in problems
            )
        )
    return config


def override_ds_config(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a DeepSpeed configuration with the values of `overrides`, by dotted key, in their places;
    objects on the way that are missing are made. ValueError, naming the flag, for a place inside a value that
    is no object."""
    config = copy.deepcopy(raw)
    for name, value in overrides.items():
        *way, last = name.split(".")
        place = config
        for depth, key in enumerate(way):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(
                    f"--ds.{name}: {'.'.join(way[: depth + 1])} is {shown(place)}, which has no keys; give "
                    f"--ds.{'.'.join(way[: depth + 1])}"
                )
        place[last] = value
    return config


def ds_config_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with a plain DeepSpeed configuration, one line each: the key, its value and the fix."""
    return [*KEYS.problems("", raw), *_conflicts(raw)]


def _conflicts(raw: dict[str, Any]) -> Iterator[str]:
    """What is wrong with keys that are each fine by themselves. The values may have any type."""
    stage = _get(raw, "zero_optimization.stage", 0)
    for part, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = f"zero_optimization.{part}.device"
        if _get(raw, device) == "cpu" and stage in (0, 1, 2, 3) and stage not in stages:
            wanted = " or ".join(str(number) for number in stages)
            yield f'{device} is "cpu" with stage {stage}, which ignores it; use stage {wanted}'
    if _get(raw, "optimizer.params.fused") and not _get(raw, "optimizer.params.torch_adam"):
        yield "optimizer.params.fused is true without torch_adam; add torch_adam: true, or remove fused"
    enabled = _get(raw, "bf16.enabled", False)
    if isinstance(enabled, bool):  # "auto" is not decided yet
        yield from _precision_conflicts(raw, bf16=enabled)


def _precision_conflicts(config: dict[str, Any], *, bf16: bool) -> Iterator[str]:
    stage = _get(config, "zero_optimization.stage", 0)
    accumulates_in = _get(config, "data_types.grad_accum_dtype")
    if bf16 and stage == 0:
        # DeepSpeed's wrapper for it refuses float32 accumulation, keeps no readable master weights and clips
        # by a norm that misses the other TP ranks.
        yield "bf16 is on with zero_optimization.stage 0, which is for float32; use stage 1, 2 or 3"
    if bf16 and stage == 1 and accumulates_in == "fp32":
        # DeepSpeed takes another optimizer class for it, with buffers that zero_state does not know.
        yield (
            'data_types.grad_accum_dtype is "fp32" with bf16 and zero_optimization.stage 1, which is not '
            "supported; use stage 2, which needs less memory and sends no more"
        )
    if bf16 and stage in (1, 2) and _get(config, "zero_optimization.reduce_scatter"):
        # DeepSpeed 0.19.8 then divides by the number of ranks before it converts to communication_data_type
        # (stage_1_and_2.py, average_tensor), and yet sends what an all-reduce sends.
        yield (
            f"zero_optimization.reduce_scatter is true with bf16 and stage {stage}, where gradients would be "
            f"divided in bfloat16; use false, which sends the same bytes"
        )
    if not bf16 and accumulates_in == "bf16":
        yield 'data_types.grad_accum_dtype is "bf16" with bf16 off; use "fp32", or remove it'


def _get(config: dict[str, Any], name: str, default: Any = None) -> Any:
    """The value at a dotted name, whatever the values on the way are."""
    found: Any = config
    for key in name.split("."):
        if not isinstance(found, dict) or key not in found:
            return default
        found = found[key]
    return found


def split_batch(global_batch: int, dp_size: int, largest_micro_batch: int | None) -> tuple[int, int]:
    """(micro_batch, grad_accum) with micro_batch * grad_accum * dp_size == global_batch.

    The micro-batch is the largest divisor of a rank's share that is not above `largest_micro_batch`, so a run
    has the same global batch at any number of ranks. Raises ValueError when dp_size does not divide the
    global batch.
    """
    if global_batch % dp_size:
        lower = global_batch // dp_size * dp_size
        raise ValueError(
            f"train_batch_size {global_batch} is not a multiple of the {dp_size} data-parallel ranks; "
            f"use {lower or dp_size} or {lower + dp_size}, or another number of ranks"
        )
    share = global_batch // dp_size
    limit = min(share, largest_micro_batch or share)
    micro_batch = next(size for size in range(limit, 0, -1) if share % size == 0)
    return micro_batch, share // micro_batch


def batch_advice(resolved: dict[str, Any], raw: dict[str, Any]) -> str:
    """A line of advice when the micro-batch came out at less than half of what the file allows, because a
    rank's share of the global batch has no better divisor; else ''."""
    micro_batch: int = resolved["train_micro_batch_size_per_gpu"]
    grad_accum: int = resolved["gradient_accumulation_steps"]
    share = micro_batch * grad_accum
    limit = min(share, raw.get("train_micro_batch_size_per_gpu") or share)
    if 2 * micro_batch >= limit:
        return ""
    dp_size = resolved["train_batch_size"] // share
    times = max(1, round(share / limit))
    return (
        f"train_batch_size {resolved['train_batch_size']} over {dp_size} data-parallel ranks makes "
        f"{grad_accum} micro-batches of {micro_batch}, far below train_micro_batch_size_per_gpu {limit} and "
        f"slow; train_batch_size {limit * times * dp_size} would make {times} of {limit}"
    )


def resolve_ds_config(raw: dict[str, Any], dp_size: int, device_type: str) -> dict[str, Any]:
    """The dictionary handed to DeepSpeed: batch split, precision and Adam's implementation decided for this
    launch.

    Depends on its arguments only, and on nothing of the host, so that all ranks agree.
    """
    config = copy.deepcopy({key: value for key, value in raw.items() if key not in SWITCHED_OFF})
    micro_batch, grad_accum = split_batch(
        raw["train_batch_size"], dp_size, raw.get("train_micro_batch_size_per_gpu")
    )
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = grad_accum
    if _get(config, "bf16.enabled") == "auto":
        config["bf16"]["enabled"] = device_type == "cuda"
    if problems := list(_precision_conflicts(config, bf16=uses_bf16(config))):
        raise ValueError("\n".join(problems))
    if uses_bf16(config):
        _reduce_in_float32(config)
    if not _offloads_optimizer(config):
        # One pass over the weights, as DeepSpeed's own fused Adam, which must be compiled first, with an nvcc
        # on each host, and cannot be told on the device to refuse an update.
        params = config["optimizer"].setdefault("params", {})
        if params.setdefault("torch_adam", True):
            params.setdefault("fused", True)
    config.setdefault("steps_per_print", 10**9)  # the trainer prints its own line
    return config


def _reduce_in_float32(config: dict[str, Any]) -> None:
    """Fill in what it takes to divide and add the ranks' bfloat16 gradients in float32."""
    zero = config["zero_optimization"]
    config.setdefault("communication_data_type", "fp32")
    if zero["stage"] in (1, 2):  # DeepSpeed's default is true, see _precision_conflicts
        zero["reduce_scatter"] = False
    if zero["stage"] in (2, 3):
        # By default the sums are rounded to the weights' own bfloat16 at once.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def _offloads_optimizer(config: dict[str, Any]) -> bool:
    return bool(_get(config, "zero_optimization.offload_optimizer.device", "none") != "none")


def uses_bf16(config: dict[str, Any]) -> bool:
    return bool(_get(config, "bf16.enabled", False))


def slow_parts(config: dict[str, Any], device_type: str) -> Iterator[str]:
    """What of a resolved configuration makes the start silent for long, in words."""
    if not _get(config, "optimizer.params.torch_adam", False):
        op = "cpu_adam" if _offloads_optimizer(config) else "fused_adam"
        yield f"DeepSpeed compiles its {op} now, unless it has before on this host; that takes about a minute"
    if device_type == "cpu" and uses_bf16(config):
        yield (
            "bfloat16 is slow on most CPUs, and the first step may take minutes; --ds.bf16.enabled false "
            "trains in float32"
        )
