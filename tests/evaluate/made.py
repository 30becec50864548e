"""Results as a run on digits would give them."""

from __future__ import annotations

from typing import Any

from megavit.evaluate.results import Count, Measurement, Result

COUNT = Count(360, 360, 0)


def measured(
    metric: str = "top1", value: float = 0.95, stderr: float | None = 0.0115, **more: Any
) -> Measurement:
    return Measurement(**{"metric": metric, "value": value, "count": COUNT, "stderr": stderr, **more})


def made(measurement: Measurement, task: str = "linear", **facts: Any) -> Result:
    usual = {
        "data": "digits",
        "model": "runs/digits",
        "protocol": task,
        "checkpoint_digest": "a" * 32,
        "data_digest": "d" * 32,
        "transform": "resize 8, crop 8",
        "versions": {"torch": "2.15.0"},
        "device": "cpu",
        "seconds": 1.5,
    }
    return Result.of(measurement, task=task, **{**usual, **facts})
