"""Which predictions are right, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megavit.evaluate.protocols.ranking import count_of, require_same_classes, right_in_top, tops
from tests.evaluate.protocols.memory import features, image_set


def reference(scores: np.ndarray, labels: list[list[int]], candidates: list[int], k: int) -> list[bool]:
    found = []
    for row, right in zip(scores, labels, strict=True):
        order = sorted(candidates, key=lambda c: (-row[c], c))[:k]
        found.append(bool(set(order) & set(right)))
    return found


def test_right_in_top_is_what_sorting_gives() -> None:
    """Catches a top 5 over classes that are no candidates, a second label that is ignored, and ties that
    fall as the sort happens to put them."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (2, 60, 12)).astype(float)  # two classifiers, many ties
    labels = [random.choice(12, random.integers(0, 4), replace=False).tolist() for _ in range(60)]
    for candidates in (None, np.array([1, 3, 4, 7, 8, 9, 11])):
        images = image_set(labels, 12, right="any", candidates=candidates)
        found = right_in_top(torch.from_numpy(scores), np.arange(60), images)
        allowed = list(range(12)) if candidates is None else candidates.tolist()
        for number, k in enumerate((1, 5)):
            for head in range(2):
                assert found[number, head].tolist() == reference(scores[head], labels, allowed, k)


def test_numbers_that_are_none_are_never_right() -> None:
    """Catches a diverged head that has everything right, since NaN is smaller than nothing."""
    scores = torch.tensor([[math.nan] * 6, [-math.inf] * 6, [0.0] * 5 + [-math.inf]])
    assert not right_in_top(scores, np.array([0, 1, 2]), image_set([0, 0, 5], 6)).any()


def test_tops_counts_and_standard_errors() -> None:
    """Catches shares of all images in place of the used ones, and a top5 of five classes."""
    train = features(image_set([0, 1]), np.zeros((2, 2)))
    images = image_set([0, [], 1, 2, 3], right="any", name="other", candidates=np.arange(6))
    test = features(images, np.zeros((5, 2)), bad=[4])
    assert count_of(test) == (5, 3, 1)
    top1, top5 = tops(train, test, torch.tensor([1.0, 3.0]), {"k": 1})
    assert (top1.metric, top1.value, top5.value, top5.metric) == ("top1", 1 / 3, 1.0, "top5")
    assert top1.stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert (top1.data, top1.settings) == ("other", {"k": 1})
    few = features(image_set([0, 1], 5), np.zeros((2, 2)))
    assert [found.metric for found in tops(few, few, torch.ones(2), {})] == ["top1"]


def test_other_classes_or_features_are_refused() -> None:
    """Catches digits' probes that are scored on ImageNet's ids, or on another layer's features."""
    train = features(image_set([0, 1]), np.zeros((2, 2)))
    for other in (
        features(image_set([0, 1], space="imagenet"), np.zeros((2, 2))),
        features(image_set([0, 1]), np.zeros((2, 2)), layer="block 3"),
        features(image_set([0, 1]), np.zeros((2, 3))),
    ):
        with pytest.raises(ValueError, match="cannot be scored on"):
            require_same_classes(train, other)
