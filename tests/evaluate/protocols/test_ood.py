"""Detectors against brute force over pairs, thresholds and distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from megavit.evaluate.protocols import ood as module
from megavit.evaluate.protocols.ood import Curve, ood
from megavit.evaluate.results import Count
from tests.evaluate.protocols.toys import features_of, softmax


def slow(inside: np.ndarray, outside: np.ndarray) -> list[float]:
    """AUROC by all pairs, AUPR and FPR95 by all thresholds."""
    roc = np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside])
    average, recall, rate = 0.0, 0.0, 2.0
    for t in sorted({*inside, *outside}, reverse=True):
        hits, false = (inside >= t).sum(), (outside >= t).sum()
        average += (hits / len(inside) - recall) * hits / (hits + false)
        recall = hits / len(inside)
        if recall >= 0.95:
            rate = min(rate, false / len(outside))
    return [roc, average, rate]


def once(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    return Curve(inside, outside).numbers(np.ones(len(inside), int), np.ones(len(outside), int))


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_numbers_are_those_of_the_definitions(digits: int) -> None:
    """Catches ties counted for one side (scores of few values), the outside as the positive class, a
    threshold of more or less than 95%; distances of some hundreds, which torchmetrics' sigmoid makes
    equal."""
    random = np.random.default_rng(digits)
    inside = np.round(random.normal(1, 1, 60), digits) * 100 - 2000
    outside = np.round(random.normal(0, 1.2, 47), digits) * 100 - 2000
    found = once(inside, outside)
    np.testing.assert_allclose(found, slow(inside, outside), atol=1e-6)
    truth, values = np.repeat([1, 0], [60, 47]), np.concatenate([inside, outside])
    assert found[0] == pytest.approx(roc_auc_score(truth, values), abs=1e-6)
    assert found[1] == pytest.approx(average_precision_score(truth, values), abs=1e-6)
    if digits:
        assert abs(float(binary_auroc(torch.from_numpy(values), torch.from_numpy(truth))) - found[0]) > 0.05


def test_exactly_95_percent() -> None:
    """Catches a threshold that needs more than 95%: 19 of 20 are above the outside ones, one is below."""
    inside, outside = np.array([5.0] * 19 + [0.0]), np.array([1.0, 2.0])
    assert once(inside, outside)[2] == 0
    assert once(inside[1:], outside)[2] == 1


def test_images_that_count_twice() -> None:
    """Catches a bootstrap of something else than the images drawn."""
    random = np.random.default_rng(4)
    inside, outside = random.normal(1, 1, 20), random.normal(0, 1, 30)
    drawn = random.integers(0, 3, 20), random.integers(0, 3, 30)
    found = Curve(inside, outside).numbers(*drawn)
    np.testing.assert_allclose(
        found, slow(np.repeat(inside, drawn[0]), np.repeat(outside, drawn[1])), atol=1e-9
    )


def test_perfect_and_random_detectors() -> None:
    """Catches a sign: a perfect detector has 1, 1 and 0, its opposite an AUROC of 0, one of noise 0.5 and
    .95."""
    high, low = np.arange(10, 20.0), np.arange(10.0)
    assert once(high, low).tolist() == [1, 1, 0]
    assert once(low, high)[0] == 0 and once(low, high)[2] == 1
    noise = np.random.default_rng(0).normal(size=(2, 20_000))
    np.testing.assert_allclose(once(*noise), [0.5, 0.5, 0.95], atol=0.02)


def test_detectors_of_features_and_logits() -> None:
    """Catches a covariance about the common mean for the shared one, distances with the wrong sign, features
    that are not normalised, k counted from 0, bad images as zeros, an unlabelled training image that pulls
    a mean. Features have a large common mean, as those of large models do."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(4, 5)) * 3 + 200
    labels = np.arange(50) % 4
    x = (centres[labels] + random.normal(size=(50, 5)) * [1, 2, 3, 1, 0.5]).astype(np.float32)
    labels[8] = -1
    inside = (centres[np.arange(21) % 4] + random.normal(size=(21, 5))).astype(np.float32)
    outside = (random.normal(size=(17, 5)) * 5 + 200).astype(np.float32)
    head = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    train = features_of(x, labels, bad=[3])
    pair = features_of(inside, np.zeros(21), bad=[4]), features_of(outside, np.full(17, 999))
    centred = torch.from_numpy(centres.mean(0).astype(np.float32))

    found = {
        m.metric: m
        for m in ood(*pair, train=train, logits_of=lambda v: (v - centred) @ torch.from_numpy(head), k=6)
    }

    kept = np.setdiff1d(np.arange(50), [3, 8])
    y, z = x[kept].astype(float), labels[kept]
    means = np.stack([y[z == c].mean(0) for c in range(4)])

    def inverse(residuals: np.ndarray) -> np.ndarray:
        covariance = residuals.T @ residuals / len(residuals)
        return np.linalg.inv(covariance + 1e-6 * np.trace(covariance) / 5 * np.eye(5))

    within, everything = inverse(y - means[z]), inverse(y - y.mean(0))

    def scores(v: np.ndarray) -> dict[str, np.ndarray]:
        v = v.astype(float)
        logits = ((v - centred.numpy()) @ head).astype(float)
        near = np.array([min((a - m) @ within @ (a - m) for m in means) for a in v])
        far = np.array([(a - y.mean(0)) @ everything @ (a - y.mean(0)) for a in v])
        unit = [
            a / np.linalg.norm(a, axis=1, keepdims=True) for a in (v, x[np.arange(50) != 3].astype(float))
        ]
        return {
            "msp": softmax(logits).max(1),
            "max_logit": logits.max(1),
            "energy": np.log(np.exp(logits).sum(1)),
            "mahalanobis": -near,
            "relative_mahalanobis": far - near,
            "knn": np.sort(unit[0] @ unit[1].T, 1)[:, -6],
        }

    expected = scores(np.delete(inside, 4, 0)), scores(outside)
    assert len(found) == 18
    for name in expected[0]:
        for metric, value in zip(
            ("auroc", "aupr", "fpr95"), slow(expected[0][name], expected[1][name]), strict=True
        ):
            assert found[f"{metric}_{name}"].value == pytest.approx(value, abs=1e-6), (metric, name)
    assert found["auroc_msp"].count == Count(38, 37, 1)
    assert found["auroc_knn"].settings["k"] == 6 and found["auroc_msp"].settings["link"] == "softmax"
    assert not found["fpr95_knn"].higher_is_better and found["auroc_knn"].higher_is_better
    gaussian = module.fit_gaussian(train).detectors(pair[1])
    np.testing.assert_allclose(gaussian["mahalanobis"], expected[1]["mahalanobis"], rtol=1e-6)
    np.testing.assert_allclose(
        gaussian["relative_mahalanobis"], expected[1]["relative_mahalanobis"], rtol=1e-6
    )
    np.testing.assert_allclose(module.kth_similarity(train, pair[1], 6), expected[1]["knn"], atol=1e-6)


def test_a_feature_that_never_varied() -> None:
    """Catches a singular covariance that raises, or that makes the one telling direction count for
    nothing."""
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(size=(60, 3)), np.ones((60, 1))], 1)
    outside = np.concatenate([random.normal(size=(30, 3)), np.full((30, 1), 1.5)], 1)
    sets = [features_of(v, np.arange(len(v)) % 2) for v in (x[:30], outside, x[30:])]
    found = {m.metric: m for m in ood(*sets[:2], train=sets[2], k=500)}
    assert found["auroc_mahalanobis"].value == 1
    assert found["auroc_knn"].settings["k"] == 30


def test_the_standard_error_is_that_of_a_mean_rank() -> None:
    """Catches a bootstrap that draws one side only: against the closed form of the AUROC's variance."""
    random = np.random.default_rng(6)
    inside, outside = random.normal(1, 1, 80), random.normal(0, 1, 120)
    wins = (inside[:, None] > outside[None]).astype(float)
    expected = np.sqrt(wins.mean(1).var(ddof=1) / 80 + wins.mean(0).var(ddof=1) / 120)
    errors = module.standard_error.bootstrap(Curve(inside, outside).numbers, 80, 120)
    assert errors[0] == pytest.approx(expected, rel=0.15)
