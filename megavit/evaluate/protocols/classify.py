"""Classification by the model's own head: top-1 and top-5 accuracy.

Accuracy is the share of images (micro): the mean over classes, which torchmetrics' `MulticlassAccuracy` gives
by default, differs wherever classes differ in size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.scores import Scores
from megavit.evaluate.results import Measurement

_ENOUGH_IMAGES, _ENOUGH_CLASSES, _SURE = 50, 10, 0.5


def classify(scores: Scores, *, chance_is_error: bool = True) -> Iterator[Measurement]:
    """top1 and, with six classes or more, top5, as shares of the images that have a label; of a multi-label
    set precision_at_1, the share whose likeliest class is among its labels.

    Raises ValueError if labels look unmapped, unless told that `chance_is_error` is False, which is for sets
    that were collected to be mistaken.
    """
    if chance_is_error:
        refuse_unmapped(scores)
    metrics = {"precision_at_1": scores.top1} if scores.multi_label else {"top1": scores.top1}
    if scores.classes > 5 and not scores.multi_label:
        metrics["top5"] = scores.top5
    for metric, right in metrics.items():
        value = share(right[scores.scored])
        yield Measurement(
            metric,
            value,
            scores.count,
            standard_error.of_share(value, scores.count.used),
            settings={"classes": scores.classes},
        )


def refuse_unmapped(scores: Scores) -> None:
    """ValueError if the model is sure of its predictions and yet right no more often than by chance: then the
    labels are not in the order of the model's outputs. An untrained model is not sure, and passes."""
    n, chance = scores.count.used, 1 / scores.classes
    if n < _ENOUGH_IMAGES or scores.classes < _ENOUGH_CLASSES:
        return
    top1, confidence = scores.top1[scores.scored].mean(), scores.confidence[scores.scored].mean()
    if confidence > _SURE and top1 <= chance + 4 * np.sqrt(chance * (1 - chance) / n):
        raise ValueError(
            f"top-1 accuracy is {top1:.2%} of {n} images, as by chance among {scores.classes} classes, while "
            f"the model's mean confidence is {confidence:.0%}: the labels do not look mapped to the model's "
            "outputs (folders numbered in another order than the classes, or class ids of another list)"
        )


def share(right: np.ndarray) -> float:
    """The mean; NaN, quietly, of nothing."""
    return float(right.mean()) if len(right) else float("nan")
