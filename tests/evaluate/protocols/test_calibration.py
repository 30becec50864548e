"""Calibration against definitions written out, and on models whose calibration is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from megavit.evaluate.protocols import calibration as module
from megavit.evaluate.protocols.calibration import (
    calibration,
    expected_calibration_error,
    halves,
    reliability,
)
from megavit.evaluate.protocols.scores import score
from megavit.evaluate.results import Count, Measurement
from tests.evaluate.protocols.toys import features_of, sigmoid, softmax


def measure(z: np.ndarray, labels: np.ndarray, link: Any = "softmax", **how: Any) -> dict[str, Measurement]:
    features = features_of(z, labels, classes=z.shape[1])
    found = score(features, lambda values: values, link)
    return {m.metric: m for m in calibration(features, lambda values: values, found, **how)}


def slow_ece(confidence: np.ndarray, right: np.ndarray) -> float:
    total = 0.0
    for k in range(15):
        members = [i for i, c in enumerate(confidence) if k / 15 < c <= (k + 1) / 15 or (k == 0 and c == 0)]
        if members:
            gap = np.mean([right[i] for i in members]) - np.mean([confidence[i] for i in members])
            total += len(members) / len(confidence) * abs(gap)
    return total


def problem(n: int = 400, classes: int = 6, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits z of which softmax(z / sharpness) are the true probabilities of the labels."""
    random = np.random.default_rng(2)
    z = random.normal(size=(n, classes)) * 1.5
    labels = np.array([random.choice(classes, p=softmax(row)) for row in z])
    return (z * sharpness).astype(np.float32).astype(float), labels


def test_numbers_are_those_of_the_definitions() -> None:
    """Catches another norm or number of bins, Brier as a mean over classes, NLL in bits."""
    z, labels = problem()
    p = softmax(z)
    confidence, right = p.max(1), (p.argmax(1) == labels).astype(float)
    found = measure(z, labels)
    assert found["ece"].value == pytest.approx(slow_ece(confidence, right), abs=1e-6)
    peer = multiclass_calibration_error(
        torch.from_numpy(p), torch.from_numpy(labels), 6, n_bins=15, norm="l1"
    )
    assert found["ece"].value == pytest.approx(float(peer), abs=1e-6)
    assert found["nll"].value == pytest.approx(-np.log(p[np.arange(400), labels]).mean(), abs=1e-6)
    assert found["brier"].value == pytest.approx(((p - np.eye(6)[labels]) ** 2).sum(1).mean(), abs=1e-6)
    assert found["nll"].stderr == pytest.approx(
        np.std(-np.log(p[np.arange(400), labels]), ddof=1) / 20, abs=1e-6
    )
    assert 0.005 < found["ece"].stderr < 0.05 and not found["ece"].higher_is_better
    assert found["ece"].settings["link"] == "softmax"


def test_bins_are_open_below_and_closed_above() -> None:
    """Catches a confidence on an edge in the upper bin, and one of exactly 1 in a bin of its own, as
    torchmetrics has it: an image that is sure and wrong then no longer meets one that is unsure and right."""
    for k in range(1, 16):
        diagram = reliability(np.array([k / 15, np.nextafter(k / 15, 0)]), np.ones(2))
        assert diagram["count"][k - 1] == 2, k
    assert reliability(np.zeros(1), np.zeros(1))["count"][0] == 1
    confidence, right = np.array([1.0, 0.95]), np.array([0.0, 1.0])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.475)
    assert reliability(confidence, right)["accuracy"] == [None] * 14 + [0.5]


def test_a_perfectly_calibrated_model() -> None:
    """Catches an ECE that is not zero where 60% of the images of confidence 0.6 are right."""
    z = np.log(np.array([[0.6, 0.3, 0.1]] * 100))
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    assert measure(z, labels)["ece"].value < 1e-6
    z, labels = problem(20_000)
    assert measure(z, labels)["ece"].value < 0.01


def test_the_temperature_is_found() -> None:
    """Catches 1 / T for T, a fit on the half that is then measured, and a fit of something else than NLL:
    logits that are three times too large are brought back, here to within what 4,000 images tell."""
    z, labels = problem(8000, sharpness=3.0)
    found = measure(z, labels)
    temperature = found["ece_scaled"].settings["temperature"]
    assert temperature == pytest.approx(3, abs=0.15)
    assert found["ece"].value > 0.15 and found["ece_scaled"].value < 0.03
    assert found["ece_scaled"].settings["before"]["ece"] > 0.15
    fitting, testing = halves(np.arange(8000))
    assert not set(fitting) & set(testing) and len(fitting) == len(testing) == 4000
    assert found["ece_scaled"].count == Count(8000, 4000, 0)
    p = softmax(z[testing] / temperature)
    nll = -np.log(p[np.arange(4000), labels[testing]])
    assert found["nll_scaled"].value == pytest.approx(nll.mean(), abs=1e-6)

    def nll_of(t: float) -> float:
        return -np.log(softmax(z[fitting] / t)[np.arange(4000), labels[fitting]]).mean()

    assert nll_of(temperature) <= min(nll_of(temperature * 1.01), nll_of(temperature / 1.01))


def test_halves_hold_all_classes() -> None:
    """Catches every second image for a half: where classes take turns it holds every second class only."""
    fitting, testing = halves(np.arange(100))
    assert set(fitting % 10) == set(testing % 10) == set(range(10))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_streaming_fits_the_same_temperature(link: Any) -> None:
    """Catches a second pass that sees other rows than the kept logits, and a link that the fit ignores."""
    z, labels = problem(300, sharpness=2.0)
    kept, streamed = (measure(z, labels, link, kept_bytes=limit) for limit in (1 << 30, 0))
    assert kept["nll_scaled"].settings["temperature"] == streamed["nll_scaled"].settings["temperature"]
    if link == "sigmoid":
        p = sigmoid(z)
        target = np.eye(6)[labels]
        nll = -(np.log(p) * target + np.log(1 - p) * (1 - target)).sum(1)
        assert kept["nll"].value == pytest.approx(nll.mean(), abs=1e-6)
        assert kept["nll_scaled"].settings["link"] == "sigmoid"


def test_several_labels_are_refused() -> None:
    """Catches a calibration error of a set where more than one prediction is right."""
    features = features_of(np.eye(4), [[0, 1], [1], [2], [3]], right="all")
    found = score(features, lambda values: values, "sigmoid")
    with pytest.raises(ValueError, match="several labels"):
        list(module.calibration(features, lambda values: values, found))
