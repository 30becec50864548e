"""The DeepSpeed JSON: what is refused, and what is derived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavit.train.ds_config import load_ds_config, resolve_ds_config, split_batch, uses_bf16

GOOD = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load(path: Path) -> None:
    """Catches a typing mistake in a file that users start from."""
    config = resolve_ds_config(load_ds_config(path), dp_size=1, device_type="cuda")
    assert (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        == config["train_batch_size"]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization"]),
        ({"gradient_cliping": 1.0}, ["gradient_cliping", "gradient_clipping"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps", "derived"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "bf16"]),
        ({"bf16": True}, ["bf16", "object"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--schedule"]),
        ({"train_batch_size": "auto"}, ["train_batch_size", "auto"]),
        ({"train_batch_size": 0}, ["train_batch_size", "0"]),
        ({"optimizer": {"type": "AdamW"}}, ["lr"]),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, ["Adam or AdamW", "Lion"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, ["zero_hpz_partition_size"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device", "nvme"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio must be 1"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    """Catches keys that DeepSpeed would ignore, and numbers with two owners."""
    with pytest.raises(ValueError) as error:
        load_ds_config(written(tmp_path, GOOD | change))
    assert all(word in str(error.value) for word in [*words, "ds.json"]), error.value


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """Catches a bare JSONDecodeError."""
    with pytest.raises(ValueError, match=r"ds\.json is not valid JSON.*line 1"):
        load_ds_config(written(tmp_path, "{'a': 1}"))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_ds_config(written(tmp_path, "[]"))
    with pytest.raises(ValueError, match="no such file"):
        load_ds_config(tmp_path / "missing.json")


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


def test_bf16_without_zero_is_refused() -> None:
    """Catches a run whose clipping and export would be wrong, see resolve_ds_config."""
    with pytest.raises(ValueError, match="stage 1"):
        resolve_ds_config(GOOD | {"bf16": {"enabled": True}}, 1, "cuda")
    stage_1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="grad_accum_dtype fp32 is not supported; use stage 2"):
        resolve_ds_config(GOOD | stage_1 | {"data_types": {"grad_accum_dtype": "fp32"}}, 1, "cuda")


def test_auto_precision_follows_the_device_and_the_input_is_left_alone() -> None:
    """Catches bf16 on a CPU, where it is slower than float32, and a resolved file written over the user's."""
    raw = GOOD | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}
    assert uses_bf16(resolve_ds_config(raw, 1, "cuda"))
    on_cpu = resolve_ds_config(raw, 1, "cpu")
    assert not uses_bf16(on_cpu) and on_cpu["optimizer"]["params"]["torch_adam"] is True
    assert raw["bf16"] == {"enabled": "auto"} and "torch_adam" not in raw["optimizer"]["params"]
