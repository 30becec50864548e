"""Selective prediction: how often a model errs if it answers only where it is sure.

Images are taken in the order of falling confidence. At coverage c the risk is the share of errors among the
first c n of them; the area under the curve is its mean over c = 1/n, 2/n, ..., 1. Among images of one
confidence no order is right: each counts with the mean error of its ties, which is the mean over all orders.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.scores import Scores
from megavit.evaluate.results import Measurement

COVERAGES = (0.5, 0.8, 0.9, 0.95)
_CURVE_POINTS = 100


def selective(scores: Scores) -> Iterator[Measurement]:
    """aurc, eaurc (what is above the best order of the same errors: all of them last), and accuracy_at_50,
    _80, _90 and _95 percent coverage. The confidence is the probability of the prediction; the curve is in
    the settings of aurc. Nothing is yielded without a scored image."""
    confidence, wrong = scores.confidence[scores.scored], 1 - scores.top1[scores.scored]
    n = len(wrong)
    if not n:
        return
    order = np.random.default_rng(0).permutation(n)  # ties in a random order, for the bootstrap
    order = order[np.argsort(-confidence[order], kind="stable")]
    numbers = _numbers(by_confidence(confidence, wrong))
    shuffled = wrong[order]
    errors = standard_error.bootstrap(lambda drawn: _numbers(np.repeat(shuffled, drawn)), n)
    names = ["aurc", "eaurc", *(f"accuracy_at_{round(100 * coverage)}" for coverage in COVERAGES)]
    settings = {"link": scores.link}
    for name, value, error in zip(names, numbers, errors, strict=True):
        more = {"curve": curve(confidence, wrong)} if name == "aurc" else {}
        yield Measurement(
            name,
            float(value),
            scores.count,
            float(error) if n > 1 else None,
            higher_is_better=name.startswith("accuracy"),
            settings={**settings, **more},
        )


def by_confidence(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """The errors in the order of falling confidence, each the mean of its ties. float64 [n]."""
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, wrong) / sizes, sizes)


def risks(ordered: np.ndarray) -> np.ndarray:
    """The risk at coverage 1/n, 2/n, ..., 1 of ordered errors."""
    return np.cumsum(ordered) / np.arange(1, len(ordered) + 1)


def covered(coverage: float, n: int) -> int:
    """How many images a coverage is: the fewest that are that share."""
    return max(1, int(np.ceil(coverage * n - 1e-9)))


def curve(confidence: np.ndarray, wrong: np.ndarray) -> dict[str, list[float]]:
    """At most 100 points of the risk-coverage curve."""
    n = len(wrong)
    at = np.unique(np.ceil(np.linspace(0, n, min(n, _CURVE_POINTS) + 1)[1:]).astype(int))
    return {"coverage": (at / n).tolist(), "risk": risks(by_confidence(confidence, wrong))[at - 1].tolist()}


def _numbers(ordered: np.ndarray) -> np.ndarray:
    """aurc, eaurc and the accuracies at `COVERAGES`, float64 [6], of ordered errors."""
    n, found = len(ordered), risks(ordered)
    errors = ordered.sum()
    # The best order of as many errors: none at first, then one more with each image.
    best = np.maximum(0, errors - np.arange(n - 1, -1, -1)) / np.arange(1, n + 1)
    accuracies = [1 - found[covered(coverage, n) - 1] for coverage in COVERAGES]
    return np.array([found.mean(), found.mean() - best.mean(), *accuracies])
