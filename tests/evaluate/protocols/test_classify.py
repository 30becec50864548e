"""Accuracy and mean average precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megavit.evaluate.protocols import scores as scores_module
from megavit.evaluate.protocols.classify import classify
from megavit.evaluate.protocols.multi_label import mean_average_precision
from megavit.evaluate.protocols.scores import score
from megavit.evaluate.results import Count
from tests.evaluate.protocols.toys import features_of, softmax


def test_accuracy_is_of_images_and_not_of_classes() -> None:
    """Catches macro averages: class 0 has nine tenths of the images and is always right, the others never."""
    labels = np.array([0] * 90 + [1, 2] * 5)
    z = np.zeros((100, 8))
    z[:, 0], z[:, 3] = 2, 1
    z[90:, 7] = -1
    top1, top5 = classify(score(features_of(z, labels), lambda values: values, "softmax"))
    assert (top1.metric, top1.value, top1.count) == ("top1", 0.9, Count(100, 100, 0))
    assert top1.stderr == pytest.approx(np.sqrt(0.9 * 0.1 / 100))
    assert top5.metric == "top5" and 0.9 <= top5.value <= 1


def test_top5_needs_six_classes() -> None:
    """Catches a top-5 of 100% that says nothing."""
    features = features_of(np.eye(5), np.arange(5))
    assert [m.metric for m in classify(score(features, lambda values: values, "softmax"))] == ["top1"]


def test_unmapped_labels_are_an_error() -> None:
    """Catches a confident model's chance accuracy printed as a number; an untrained model's is one."""
    random = np.random.default_rng(0)
    truth = np.arange(400) % 40
    sure = np.eye(40)[truth] * 20
    shuffled = (truth * 7 + 3) % 40
    with pytest.raises(ValueError, match=r"as by chance among 40 classes.*do not look mapped"):
        list(classify(score(features_of(sure, shuffled), lambda values: values, "softmax")))
    assert next(classify(score(features_of(sure, truth), lambda values: values, "softmax"))).value == 1
    unsure = random.normal(size=(400, 40)) * 0.1
    assert next(classify(score(features_of(unsure, truth), lambda values: values, "softmax"))).value < 0.1


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_mean_average_precision(link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ties broken in favour of the positives, classes without a positive averaged as zero, a label
    that is named twice, positives of a bad image, negative scores in the wrong order. The scores are rounded
    so that many are equal, of both signs and zero."""
    monkeypatch.setattr(scores_module, "_ELEMENTS", 70)
    random = np.random.default_rng(5)
    z = np.round(random.normal(size=(41, 7)) * 2) / 2 * 1.0
    lists = [[int(c) for c in random.choice(6, i % 4, replace=False)] for i in range(41)]
    lists[11] = [2, 2]
    bad = [3, 40]
    features = features_of(z, lists, bad=bad, classes=7, right="all")
    (found,) = mean_average_precision(features, lambda values: values, link)
    kept = [row for row in range(41) if row not in bad]
    ranked = (z if link == "sigmoid" else np.log(softmax(z)).astype(np.float32)).astype(float)[kept]
    precisions = []
    for c in range(6):
        positive = np.array([c in lists[row] for row in kept])
        at = [(ranked[:, c] >= t) for t in ranked[positive, c]]
        precisions.append(np.mean([positive[reached].mean() for reached in at]))
    assert found.value == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found.count == Count(41, 39, 2)
    assert found.settings["classes_with_positives"] == 6 and found.stderr is None


def test_precision_at_one_of_several_labels() -> None:
    """Catches a multi-label set whose first label alone is right."""
    z = np.eye(6)[[0, 1, 2, 3]] * 9
    features = features_of(z, [[5, 0], [1], [4, 3], []], right="all")
    (found,) = classify(score(features, lambda values: values, "sigmoid"))
    assert (found.metric, found.value, found.count) == (
        "precision_at_1",
        pytest.approx(2 / 3),
        Count(4, 3, 0),
    )
