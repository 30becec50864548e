"""Interrupted = uninterrupted, at any layout before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.runs import ds_config, small_run, steps_of, train_here

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
    run = small_run(digits, folder, tensor_parallel_size=tp, **changes)
    assert run_ranks(tp * dp, train_here, run, raw) == [""] * (tp * dp)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, digits, "one rank, stage 3")
    return folder


PAIRS = [
    ("tp 2, dp 2, stage 3", "one rank, stage 3"),
    ("tp 2, dp 2, stage 3", "dp 3, stage 3"),
    ("tp 2, dp 2, stage 3", "tp 4, stage 3"),
    ("tp 2, dp 2, stage 3", "dp 2, stage 3"),
    ("tp 2, dp 2, stage 3", "dp 2, stage 1"),
    ("dp 2, stage 1", "tp 2, dp 2, stage 2"),
    ("tp 2, dp 2, stage 2", "dp 2, stage 0"),
    ("dp 2, stage 0", "dp 3, stage 3"),
    ("dp 3, stage 3", "dp 2, stage 3, accumulation"),
    ("dp 2, stage 3, accumulation", "dp 2, stage 3, offloaded"),
    ("dp 2, stage 3, offloaded", "tp 4, stage 3"),
]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=[" -> ".join(pair) for pair in PAIRS])
def test_resume_at_another_layout(whole: Path, digits: Path, tmp_path: Path, before: str, after: str) -> None:
    """Catches slices that land in the wrong place, lost moments, decay or step counts, data read twice."""
    folder = tmp_path / "run"
    start(folder, digits, before, stop_at_step=8)
    start(folder, digits, after)
    resumed, expected = steps_of(folder), steps_of(whole)
    assert [row["step"] for row in resumed] == list(range(1, 21))
    for mine, theirs in zip(resumed, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), mine["step"]
