"""Interrupted = uninterrupted, at any layout before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

STEPS, STOP = 8, 3
# (tp, dp, ZeRO configuration)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp 2, dp 2, stage 3": (2, 2, ds_config(3)),
    "one rank, stage 3": (1, 1, ds_config(3)),
    "dp 3, stage 3": (1, 3, ds_config(3, stage3_param_persistence_threshold=0)),
    "tp 4, stage 3": (4, 1, ds_config(3)),
    "dp 2, stage 3": (1, 2, ds_config(3, sub_group_size=20_000)),
    "dp 2, stage 1": (1, 2, ds_config(1)),
    "tp 2, dp 2, stage 2": (2, 2, ds_config(2)),
    "dp 2, stage 0": (1, 2, ds_config(0)),
    "dp 2, stage 3, accumulation": (1, 2, ds_config(3, micro_batch=12)),
    "dp 2, stage 3, offloaded": (
        1,
        2,
        ds_config(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
    ),
}


def start(folder: Path, digits: Path, layout: str, **changes: Any) -> None:
    tp, dp, raw = LAYOUTS[layout]
    changes |= {"tensor_parallel_size": tp, "task__head_weight_decay": 3.0, "max_steps": STEPS}
    run = small_run(digits, folder, **changes)
    assert run_ranks(tp * dp, train_here, run, raw) == [""] * (tp * dp)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, digits, "one rank, stage 3")
    return folder


@pytest.fixture(scope="module")
def stopped(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """Copies the folder of a run with a layout that stopped at step STOP; a layout runs once only."""
    folders: dict[str, Path] = {}

    def copy(layout: str, folder: Path) -> None:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("stopped") / "run"
            start(folders[layout], digits, layout, stop_at_step=STOP)
        shutil.copytree(folders[layout], folder, symlinks=True)

    return copy


PAIRS = [
    ("tp 2, dp 2, stage 3", "one rank, stage 3"),
    ("tp 2, dp 2, stage 3", "dp 3, stage 3"),
    ("tp 2, dp 2, stage 3", "tp 4, stage 3"),
    ("tp 2, dp 2, stage 3", "dp 2, stage 1"),
    ("dp 2, stage 1", "tp 2, dp 2, stage 2"),
    ("tp 2, dp 2, stage 2", "dp 2, stage 0"),
    ("dp 2, stage 0", "dp 2, stage 3, accumulation"),
    ("dp 2, stage 3, accumulation", "dp 2, stage 3, offloaded"),
    ("dp 2, stage 3, offloaded", "dp 2, stage 3"),
]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=[" -> ".join(pair) for pair in PAIRS])
def test_resume_at_another_layout(
    whole: Path, stopped: Callable[[str, Path], None], digits: Path, tmp_path: Path, before: str, after: str
) -> None:
    """Catches slices that land in the wrong place, lost moments, decay or step counts, data read twice."""
    folder = tmp_path / "run"
    stopped(before, folder)
    start(folder, digits, after)
    resumed, expected = steps_of(folder), steps_of(whole)
    assert [row["step"] for row in resumed] == list(range(1, STEPS + 1))
    for mine, theirs in zip(resumed, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), mine["step"]
    manifest = json.loads((folder / "checkpoints" / f"step_{STEPS:08}" / "manifest.json").read_text())
    decay = {group["name"]: group["weight_decay"] for group in manifest["optimizer"]["groups"]}
    assert decay == {"body": 0.05, "head": 3.0, "no_decay": 0.0}
    assert set(manifest["optimizer"]["steps"].values()) == {STEPS}
    (resumed_at,) = (row for row in log_of(folder) if row.get("event") == "resumed")
    assert resumed_at["step"] == STOP
    for number, name in enumerate(["tensor_parallel_size", "data-parallel ranks"]):
        was, is_now = LAYOUTS[before][number], LAYOUTS[after][number]
        assert (f"{name} {was} -> {is_now}" in resumed_at["changes"]) == (was != is_now)


@pytest.mark.dist
@pytest.mark.slow
def test_layer_decay_goes_on_at_another_layout(whole: Path, digits: Path, tmp_path: Path) -> None:
    """Catches learning rates of layers that are lost, or land in other groups, when a run goes on."""
    decay = {"schedule__layer_decay": 0.75}
    start(tmp_path / "whole", digits, "one rank, stage 3", **decay)
    start(tmp_path / "run", digits, "tp 2, dp 2, stage 3", stop_at_step=STEPS // 2, **decay)
    start(tmp_path / "run", digits, "dp 2, stage 1", **decay)
    expected, resumed, plain = (
        [row["loss"] for row in steps_of(folder)] for folder in (tmp_path / "whole", tmp_path / "run", whole)
    )
    assert resumed == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(plain[-1], rel=1e-3)


def test_shipped_loss_stays_readable(whole: Path) -> None:
    """Catches a log that is no JSON, e.g. with NaN in it."""
    for line in (whole / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.dist
@pytest.mark.slow
def test_init_from_an_export(digits: Path, tmp_path: Path) -> None:
    """Catches weights loaded into the wrong places or not at all, a classifier of the wrong size loaded, and
    silence about either."""
    learned = tmp_path / "learned"
    assert run_ranks(1, train_here, small_run(digits, learned), ds_config(3)) == [""]
    exported = str(learned / "export")
    runs = {
        "same": (1, {}),
        "other": (2, {"model__num_classes": 12, "model__image_size": 16, "data__crop_area": (0.5, 1.0)}),
        "sharded": (4, {"tensor_parallel_size": 2}),
    }
    said = {}
    for name, (ranks, changes) in runs.items():
        run = small_run(digits, tmp_path / name, init_from=exported, max_steps=1, **changes)
        assert run_ranks(ranks, train_here, run, ds_config(3)) == [""] * ranks
        (row,) = (row for row in log_of(tmp_path / name) if row.get("event") == "initialised")
        said[name] = row["what"]
    names = len(load_file(learned / "export" / "model.safetensors"))
    assert said["same"] == said["sharded"] == f"{names} of {names} tensors loaded from {exported}"
    assert f"{names - 2} of {names} tensors loaded" in said["other"]
    assert "position embedding resized from 16 to 64 tokens" in said["other"]
    assert "newly initialised: head.weight, head.bias" in said["other"]
    first = {name: steps_of(tmp_path / name)[0]["loss"] for name in runs}
    assert first["same"] < steps_of(learned)[0]["loss"] - 0.05
    assert first["sharded"] == pytest.approx(first["same"], rel=1e-5)
    wider = small_run(digits, tmp_path / "wider", init_from=exported, model__dim=128)
    (error,) = run_ranks(1, train_here, wider, ds_config(3))
    assert "has shape (64, 4), this model needs (128, 4)" in error


@pytest.mark.dist
@pytest.mark.slow
def test_bfloat16_goes_on_to_the_bit(digits: Path, tmp_path: Path) -> None:
    """Catches a run that goes on from the bfloat16 copies instead of the float32 master weights."""
    raw = ds_config(3) | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    for name, stops in {"whole": (STEPS,), "halves": (STOP, STEPS)}.items():
        for stop in stops:
            run = small_run(digits, tmp_path / name, max_steps=STEPS, stop_at_step=stop)
            assert run_ranks(2, train_here, run, raw) == [""] * 2
    whole, halves = (steps_of(tmp_path / name) for name in ("whole", "halves"))
    assert [row["loss"] for row in halves] == [row["loss"] for row in whole]
