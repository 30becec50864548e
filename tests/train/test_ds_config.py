"""The DeepSpeed JSON: what is derived from it, and that the engine trains the same with every key that is
accepted. What is refused is in `tests/mistakes/test_ds_config.py`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import (
    batch_advice,
    ds_config_problems,
    load_ds_config,
    resolve_ds_config,
    split_batch,
    uses_bf16,
)
from megavit.train.ds_keys import KEYS, SWITCHED_OFF
from megavit.train.ds_rules import Block
from tests.ranks import run_ranks
from tests.train.test_engine import LR, RUN, WEIGHTS, ds_config, inputs, shards_of

GOOD = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load(path: Path) -> None:
    """Catches a typing mistake in a file that users start from, and one that reduces gradients in
    bfloat16."""
    config = resolve_ds_config(load_ds_config(path), dp_size=1, device_type="cuda")
    assert (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        == config["train_batch_size"]
    )
    assert not uses_bf16(config) or config["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("global_batch", "dp_size", "limit", "expected"),
    [(64, 1, None, (64, 1)), (64, 2, 64, (32, 1)), (64, 4, 8, (8, 2)), (60, 2, 8, (6, 5)), (7, 1, 4, (1, 7))],
)
def test_batch_split(global_batch: int, dp_size: int, limit: int | None, expected: tuple[int, int]) -> None:
    """Catches a global batch that depends on the number of ranks."""
    micro_batch, grad_accum = split_batch(global_batch, dp_size, limit)
    assert (micro_batch, grad_accum) == expected
    assert micro_batch * grad_accum * dp_size == global_batch


def test_indivisible_batch_offers_its_neighbours() -> None:
    """Catches silently dropped samples."""
    with pytest.raises(ValueError, match="64 is not a multiple of the 6 .*use 60 or 66"):
        split_batch(64, 6, None)


@pytest.mark.parametrize(
    ("global_batch", "dp_size", "limit", "advice"),
    [
        (257, 1, 64, "makes 257 micro-batches of 1, .* train_batch_size 256 would make 4 of 64"),
        (2 * 127, 2, 64, "over 2 data-parallel ranks .* train_batch_size 256 would make 2 of 64"),
        (130, 1, 64, "makes 5 micro-batches of 26, .* train_batch_size 128 would make 2 of 64"),
        (256, 1, 64, ""),
        (256, 1, None, ""),
        (60, 2, 8, ""),
        (31, 1, 64, ""),
    ],
)
def test_a_global_batch_that_divides_badly_is_said(
    global_batch: int, dp_size: int, limit: int | None, advice: str
) -> None:
    """Catches a run that is a hundred times slower without a word, and advice where nothing is wrong."""
    raw = GOOD | {"train_batch_size": global_batch, "train_micro_batch_size_per_gpu": limit}
    found = batch_advice(resolve_ds_config(raw, dp_size, "cpu"), raw)
    assert re.search(advice, found) if advice else not found, found


def test_auto_precision_follows_the_device_and_the_input_is_left_alone() -> None:
    """Catches bf16 on a CPU, where it is slower than float32, and a resolved file written over the user's."""
    raw = GOOD | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}
    before = copy.deepcopy(raw)
    assert uses_bf16(resolve_ds_config(raw, 1, "cuda"))
    on_cpu = resolve_ds_config(raw, 1, "cpu")
    assert not uses_bf16(on_cpu) and on_cpu["optimizer"]["params"]["torch_adam"] is True
    assert raw == before


def test_auto_precision_is_checked_when_the_device_is_known() -> None:
    """Catches bf16 at stage 0 by way of "auto": clipping and export would be wrong."""
    raw = GOOD | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 0}}
    assert not ds_config_problems(raw) and not uses_bf16(resolve_ds_config(raw, 1, "cpu"))
    with pytest.raises(ValueError, match="use stage 1, 2 or 3"):
        resolve_ds_config(raw, 1, "cuda")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_gradients_are_reduced_in_float32_unless_told_otherwise(stage: int) -> None:
    """Catches DeepSpeed's defaults, which divide, add and accumulate in bfloat16; what they do is measured in
    test_reduction."""
    raw = GOOD | {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config = resolve_ds_config(raw, 1, "cuda")
    assert config["communication_data_type"] == "fp32"
    assert config["zero_optimization"].get("reduce_scatter") is (None if stage == 3 else False)
    assert config.get("data_types") == (None if stage == 1 else {"grad_accum_dtype": "fp32"})
    told = raw | {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    config = resolve_ds_config(told, 1, "cuda")
    assert (config["communication_data_type"], config["data_types"]) == ("bf16", {"grad_accum_dtype": "bf16"})


def test_the_optimizer_does_not_depend_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hosts of one job that choose different implementations of Adam, because one has nvcc."""
    (tmp_path / "nvcc").touch(mode=0o755)
    found = []
    for folder in (tmp_path, tmp_path / "without"):
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setenv("CUDA_HOME", str(folder))
        found.append(resolve_ds_config(GOOD, 1, "cuda")["optimizer"]["params"])
    assert found[0] == found[1] and found[0]["torch_adam"] is found[0]["fused"] is True
    told = GOOD | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": False}}}
    assert "fused" not in resolve_ds_config(told, 1, "cuda")["optimizer"]["params"]


# What people's files hold, and what happens anyway.
HARMLESS: dict[str, Any] = {
    "bf16": {"enabled": False},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "dump_state": True,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "memory_breakdown": False,
    "optimizer": {
        "type": "Adam",
        "params": {
            "lr": LR,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "torch_adam": True,
            "fused": False,
            "adam_w_mode": True,
        },
    },
    "prescale_gradients": False,
    "steps_per_print": 1,
    "wall_clock_breakdown": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero": {
        "allgather_partitions": True,
        "compute_grad_norm": True,
        "elastic_checkpoint": False,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
        "round_robin_gradients": False,
        "stage3_gather_16bit_weights_on_model_save": True,
        "use_multi_rank_bucket_allreduce": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_gradients": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_weights": False,
    },
} | {name: {"enabled": False, "whatever": ["it", {"holds": None}]} for name in SWITCHED_OFF}

# Other ways to the same sums.
SMALL: dict[str, Any] = {
    "zero": {
        "reduce_bucket_size": 5e3,
        "allgather_bucket_size": 4e3,
        "sub_group_size": 2e4,
        "stage3_prefetch_bucket_size": 2e3,
        "stage3_param_persistence_threshold": 100,
        "stage3_model_persistence_threshold": 1e3,
        "stage3_max_live_parameters": 1e4,
        "stage3_max_reuse_distance": 0,
    }
}
OTHERWISE: dict[str, Any] = {
    "zero": {
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "ignore_unused_parameters": False,
        "memory_efficient_linear": False,
    }
}
ON_HOST: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1, "torch_adam": True}},
    "zero": {
        "offload_optimizer": {
            "device": "cpu",
            "pin_memory": True,
            "ratio": 1.0,
            "fast_init": False,
            "pipeline_read": False,
            "pipeline_write": False,
            "super_offload": False,
        },
        "overlap_comm": True,
    },
}
ALL_ON_HOST = ON_HOST | {"zero": ON_HOST["zero"] | {"offload_param": {"device": "cpu", "pin_memory": False}}}

# (stage, what is changed)
CASES = [
    *((stage, HARMLESS) for stage in (0, 1, 2, 3)),
    *((stage, way) for stage in (1, 2, 3) for way in (SMALL, OTHERWISE)),
    *((stage, way) for stage, way in ((1, ON_HOST), (2, ON_HOST), (3, ALL_ON_HOST))),
]


def raw_config(stage: int, change: dict[str, Any], **more: Any) -> dict[str, Any]:
    return ds_config(stage, micro_batch=2, **copy.deepcopy(change) | more)


def trained(raw: dict[str, Any]) -> tuple[list[float], dict[str, Any], list[dict[str, Any]]]:
    """Losses and norms of three steps of a new engine, its weights, and its optimizer's groups."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(1)
    assert ds_config_problems(raw) == []
    engine = Engine(RUN, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    numbers = []
    for step in range(3):
        result = engine.train_step(inputs(RUN, mesh, step, engine.micro_batch), WEIGHTS.sum(), LR)
        numbers += [result.loss, result.grad_norm]
    return numbers, shards_of(engine), engine.state.optimizer_state()["groups"]


def differences() -> list[float]:
    """The largest relative difference of each case's losses and norms, and absolute one of its weights, from
    those of the plain configuration of its stage."""
    plain = {stage: trained(raw_config(stage, {})) for stage in (0, 1, 2, 3)}
    found = []
    for stage, change in CASES:
        numbers, weights, _ = trained(raw_config(stage, change))
        expected, same, _ = plain[stage]
        relative = max(abs(a / b - 1) for a, b in zip(numbers, expected, strict=True))
        found.append(max(relative, *(float((w - same[name]).abs().max()) for name, w in weights.items())))
    return found


@pytest.mark.dist
def test_every_accepted_key_trains_the_same() -> None:
    """Catches a key that is accepted and trains something else (round_robin_gradients did), or crashes."""
    for found in run_ranks(2, differences):
        named = [
            (stage, list(change["zero"]), value) for (stage, change), value in zip(CASES, found, strict=True)
        ]
        # Adam fused and not fused round differently, and its first steps enlarge that.
        assert all(value < 2e-5 for value in found), named


def numbers_of_the_file() -> None:
    """Betas, eps and weight decay reach the optimizer; clipping at 0 is none, whatever the stage."""
    params = {"lr": LR, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3}
    own = [raw_config(stage, {}, gradient_clipping=0) for stage in (0, 2, 3)]
    for raw in own:
        raw["optimizer"]["params"] = dict(params)
    first, *others = [trained(raw) for raw in own]
    for numbers, _, groups in (first, *others):
        assert numbers == pytest.approx(first[0], rel=1e-5)
        assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.95)}
        assert {group["eps"] for group in groups} == {1e-6}
        assert [group["weight_decay"] for group in groups if group["name"] == "body"] == [0.3]
    clipped = trained(raw_config(3, {}))[0]
    assert first[0][0] == pytest.approx(clipped[0]) and abs(first[0][4] - clipped[4]) > 1e-3


@pytest.mark.dist
def test_the_numbers_of_the_file_are_those_of_the_optimizer() -> None:
    """Catches a number of the file that is read and not used."""
    run_ranks(1, numbers_of_the_file)


def names_in(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict) and key not in SWITCHED_OFF:
            yield from names_in(value, f"{prefix}{key}.")


def accepted_in(block: Block, prefix: str = "") -> Iterator[str]:
    for key, rule in block.accepted.items():
        yield prefix + key
        if isinstance(rule, Block):
            yield from accepted_in(rule, f"{prefix}{key}.")


def test_no_key_is_accepted_that_no_case_trains_with() -> None:
    """Catches a key that is added to the accepted ones without a run of the engine."""
    trained_with = {name for case in CASES for name in names_in(raw_config(*case))}
    assert set(accepted_in(KEYS)) == trained_with
    assert all(ds_config_problems(raw_config(*case)) == [] for case in CASES)


def test_every_key_of_deepspeed_is_accepted_or_refused_with_a_reason() -> None:
    """Catches a key that a new DeepSpeed reads and that would be called unknown here."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = KEYS.accepted["zero_optimization"]
    assert isinstance(zero, Block)
    for rule, model in [
        (KEYS.accepted["bf16"], DeepSpeedBF16Config),
        (zero, DeepSpeedZeroConfig),
        (zero.accepted["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
        (zero.accepted["offload_param"], DeepSpeedZeroOffloadParamConfig),
    ]:
        assert isinstance(rule, Block)
        read = {field.alias or name for name, field in model.model_fields.items()}
        assert read <= set(rule.accepted) | set(rule.refused), model.__name__
