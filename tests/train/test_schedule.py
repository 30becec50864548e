"""Learning rates."""

from __future__ import annotations

import json

import pytest

from megavit.recipe import PROJECT_ROOT, RECIPES, read_recipe
from megavit.train.config import ScheduleConfig
from megavit.train.schedule import lr_at


def rates(schedule: ScheduleConfig, total: int) -> list[float]:
    return [lr_at(step, total, 1e-3, schedule) for step in range(total)]


@pytest.mark.parametrize("name", ["rsqrt", "cosine", "linear", "constant"])
def test_warmup_peak_and_no_wasted_step(name: str) -> None:
    """Catches a first or last update with a learning rate of zero, and a peak that is missed."""
    schedule = ScheduleConfig(name=name, warmup_steps=10, cooldown_steps=0, timescale_steps=20)
    found = rates(schedule, 100)
    assert found[0] == pytest.approx(1e-4)
    assert max(found) == pytest.approx(1e-3)
    assert min(found) > 0
    assert found[:10] == sorted(found[:10])
    assert found[10:] == sorted(found[10:], reverse=True)


def test_rsqrt_is_big_visions_formula() -> None:
    """Catches a timescale counted from step 0, or an exponent other than one half."""
    schedule = ScheduleConfig(
        name="rsqrt", warmup_steps=10_000, cooldown_steps=30_000, timescale_steps=10_000
    )
    assert lr_at(40_000, 177_000, 1e-3, schedule) == pytest.approx(1e-3 / 2)  # sqrt(1 + 30000/10000)
    before, after = (lr_at(step, 177_000, 1.0, schedule) for step in (146_999, 162_000))
    assert after / before == pytest.approx(0.5 * (147_000 / 162_000) ** 0.5, rel=1e-3)


def test_half_way_values() -> None:
    """Catches cosine and linear shapes that do not end at the last step."""
    assert lr_at(50, 100, 1.0, ScheduleConfig("cosine", 0, 0)) == pytest.approx(0.5)
    assert lr_at(75, 100, 1.0, ScheduleConfig("linear", 0, 0)) == pytest.approx(0.25)
    assert lr_at(95, 100, 1.0, ScheduleConfig("constant", 0, 10)) == pytest.approx(0.5)


def test_the_depth_recipe_has_the_points_of_the_papers_schedule() -> None:
    """Catches a recipe whose warm-up counts from 1, or whose cosine ends elsewhere (ViT-22B, depth)."""
    run = read_recipe(RECIPES / "depth_dpt.yaml")
    peak = json.loads((PROJECT_ROOT / "ds_configs" / "zero3_depth.json").read_text())["optimizer"]["params"][
        "lr"
    ]
    points = {0: 0.0, 1_250: 1e-4, 2_500: 2e-4, 151_250: 1e-4, 300_000: 0.0}
    found = {step: lr_at(step, run.max_steps, peak, run.schedule) for step in points}
    assert found == pytest.approx(points, rel=1e-12, abs=1e-18)
