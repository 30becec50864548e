"""Risk and coverage against loops over all coverages."""

from __future__ import annotations

import numpy as np
import pytest

from megavit.evaluate.protocols.scores import score
from megavit.evaluate.protocols.selective import selective
from megavit.evaluate.results import Measurement
from tests.evaluate.protocols.toys import features_of, softmax


def measure(z: np.ndarray, labels: np.ndarray) -> dict[str, Measurement]:
    return {m.metric: m for m in selective(score(features_of(z, labels), lambda values: values, "softmax"))}


def test_numbers_are_those_of_the_definitions() -> None:
    """Catches rising for falling confidence, risks of the images left out, a coverage rounded down."""
    random = np.random.default_rng(0)
    z = random.normal(size=(53, 4)).astype(np.float32).astype(float)
    labels = random.integers(0, 4, 53)
    found = measure(z, labels)
    p = softmax(z)
    order = sorted(range(53), key=lambda i: -p[i].max())
    wrong = [float(p[i].argmax() != labels[i]) for i in order]
    risks = [np.mean(wrong[:k]) for k in range(1, 54)]
    best = [np.mean(sorted(wrong)[:k]) for k in range(1, 54)]
    assert found["aurc"].value == pytest.approx(np.mean(risks), abs=1e-6)
    assert found["eaurc"].value == pytest.approx(np.mean(risks) - np.mean(best), abs=1e-6)
    for coverage in (0.5, 0.8, 0.9, 0.95):
        k = next(k for k in range(1, 54) if k / 53 >= coverage)
        assert found[f"accuracy_at_{coverage * 100:.0f}"].value == pytest.approx(1 - risks[k - 1], abs=1e-6)
    assert found["aurc"].settings["curve"]["risk"][-1] == pytest.approx(np.mean(wrong))
    assert found["aurc"].stderr > 0 and not found["aurc"].higher_is_better


def test_a_perfect_and_a_useless_confidence() -> None:
    """Catches an excess that is not zero for the best order, and ties whose order decides: with one
    confidence for all images the risk is the error rate at every coverage, whatever the order of the
    images."""
    labels = np.array([0] * 6 + [1] * 4)
    sure = np.stack([np.linspace(9, 1, 10), np.zeros(10)], 1)
    found = measure(sure, labels)
    assert found["eaurc"].value == pytest.approx(0, abs=1e-9) and found["accuracy_at_50"].value == 1
    for order in (slice(None), slice(None, None, -1)):
        same = measure(np.tile([[1.0, 0.0]], (10, 1)), labels[order])
        assert same["aurc"].value == pytest.approx(0.4) and same["accuracy_at_50"].value == pytest.approx(0.6)
