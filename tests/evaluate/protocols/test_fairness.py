"""Rates by group against counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megavit.evaluate.protocols.fairness import CAVEAT, fairness
from megavit.evaluate.results import Count, Measurement


def measure(*arrays: Any) -> dict[str, Measurement]:
    columns = [np.array(values, np.int64) for values in arrays]
    return {m.metric: m for m in fairness(*columns, target_name="Smiling", group_name="Male")}


def test_rates_are_those_of_counting() -> None:
    """Catches groups that are not numbered from 0, rates over everybody instead of the group, positive
    targets for positive predictions, and images without a prediction or a group that count."""
    random = np.random.default_rng(0)
    predicted, target = random.integers(0, 2, (2, 500))
    group = random.choice([-1, 1, 4, 7], 500, p=[0.1, 0.5, 0.3, 0.1])
    predicted[::11] = -1
    found = measure(predicted, target, group)
    accuracy, positive = [], []
    for name in (1, 4, 7):
        members = [i for i in range(500) if group[i] == name and predicted[i] >= 0]
        accuracy.append(np.mean([predicted[i] == target[i] for i in members]))
        positive.append(np.mean([predicted[i] == 1 for i in members]))
        assert found[f"accuracy[Male={name}]"].value == pytest.approx(accuracy[-1], abs=1e-6)
        assert found[f"positive_rate[Male={name}]"].value == pytest.approx(positive[-1], abs=1e-6)
        assert found[f"accuracy[Male={name}]"].count == Count(len(members), len(members), 0)
    for metric, rates in (("accuracy", accuracy), ("positive_rate", positive)):
        assert found[f"{metric}_gap"].value == pytest.approx(max(rates) - min(rates), abs=1e-6)
        assert found[f"{metric}_ratio"].value == pytest.approx(min(rates) / max(rates), abs=1e-6)
    used = int(((predicted >= 0) & (group >= 0)).sum())
    assert found["accuracy_gap"].count == Count(500, used, int((predicted < 0).sum()))
    assert not found["accuracy_gap"].higher_is_better and found["accuracy_ratio"].higher_is_better
    assert all(m.settings["caveat"] == CAVEAT and "technical claim" in CAVEAT for m in found.values())


def test_standard_error_of_a_gap() -> None:
    """Catches the two groups drawn as one: for two groups the gap's variance is the sum of the shares'."""
    predicted = np.array([1] * 700 + [0] * 300 + [1] * 100 + [0] * 300)
    group = np.repeat([0, 1], [1000, 400])
    found = measure(predicted, np.ones(1400), group)
    expected = np.sqrt(0.7 * 0.3 / 1000 + 0.25 * 0.75 / 400)
    assert found["positive_rate_gap"].value == pytest.approx(0.45, abs=1e-6)
    assert found["positive_rate_gap"].stderr == pytest.approx(expected, rel=0.1)


def test_what_has_no_gap() -> None:
    """Catches a gap of zero within a single group, a target of three classes, and a model that never says
    yes, for which there is no ratio."""
    with pytest.raises(ValueError, match="Male has 1 groups among 3 images"):
        measure([0, 1, 1], [0, 1, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="more than the classes 0 and 1"):
        measure([0, 2, 1], [0, 1, 0], [1, 1, 0])
    found = measure([0] * 6, [0, 1] * 3, [0, 0, 0, 1, 1, 1])
    assert np.isnan(found["positive_rate_ratio"].value) and found["positive_rate_gap"].value == 0
