"""Are the probabilities true? Calibration error, likelihood and Brier score, before and after scaling.

ECE uses bins (k/15, (k+1)/15], as the literature does. torchmetrics' bins are [k/15, (k+1)/15) with one more
for a confidence of exactly 1, which saturated models reach often: it gives another number there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.scores import (
    Link,
    LogitsOf,
    Scores,
    logits_in_pieces,
    normaliser,
    score,
    targets_of,
    together,
)
from megavit.evaluate.results import Count, Measurement

BINS = 15
_EDGES = np.arange(BINS + 1) / BINS
_COLDEST, _HOTTEST = 0.01, 100.0
# The ranks keep the logits of the fitting half, in float32, if these are not more in all; else they ask the
# classifier again for each of the some 30 temperatures that are tried. (25,000 x 1,000 logits: 0.1 GB.)
_KEPT_BYTES = 1 << 30


def calibration(
    features: Features, logits_of: LogitsOf, scores: Scores, kept_bytes: int = _KEPT_BYTES
) -> Iterator[Measurement]:
    """ece, nll and brier of all scored images; ece_scaled, nll_scaled and brier_scaled of a half of them
    after dividing the logits by the temperature that gives the other half the least NLL.

    `scores` is what `score` found on the same features and classifier. `settings` name the link that made the
    probabilities (softmax is the convention for comparisons, also of a model trained with sigmoids), the
    temperature, the same numbers of the half before scaling, and the reliability diagram. The halves are
    drawn by a fixed seed. Collective: a scalar all-reduce for each temperature, and a second pass.
    """
    if scores.multi_label:
        raise ValueError(
            f"{features.set.name} has several labels an image; calibration needs one right class each"
        )
    everything = np.flatnonzero(scores.scored)
    yield from _measure(scores, everything, "", {"link": scores.link})
    fitting, testing = halves(everything)
    if not len(fitting):
        return
    temperature = fit_temperature(features, logits_of, scores.link, fitting, kept_bytes)
    scaled = score(features, lambda values: logits_of(values) / temperature, scores.link)
    before = {name: _numbers(scores, testing)[name] for name in ("ece", "nll", "brier")}
    settings = {"link": scores.link, "temperature": temperature, "fitted_on": len(fitting), "before": before}
    yield from _measure(scaled, testing, "_scaled", settings)


def halves(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves, each in order, always the same ones. At random: classes may follow one another in
    any pattern, so that every second image can be of few classes only."""
    drawn = np.random.default_rng(0).permutation(rows)
    return np.sort(drawn[: len(rows) // 2]), np.sort(drawn[len(rows) // 2 :])


@torch.no_grad()
def fit_temperature(
    features: Features, logits_of: LogitsOf, link: Link, rows: np.ndarray, kept_bytes: int = _KEPT_BYTES
) -> float:
    """The T in [0.01, 100] for which logits / T have the least mean NLL over `rows`.

    The NLL is convex in 1 / T, so Brent's method on log T finds the minimum. All ranks see the same sums and
    try the same temperatures. Collective.
    """
    targets, candidates, classes = targets_of(features, logits_of, True)
    wanted = np.zeros(len(targets), bool)
    wanted[rows] = True

    def look() -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, logits in logits_in_pieces(features, logits_of, candidates, classes):
            keep = torch.from_numpy(wanted[numbers]).to(logits.device)
            places = torch.from_numpy(targets[numbers]).to(logits.device)
            label = logits.gather(1, places.clamp(min=0)).masked_fill(places < 0, -torch.inf).amax(1)
            yield logits[keep].float(), label[keep]

    kept = list(look()) if len(rows) * classes * 4 <= kept_bytes else None

    def nll(log_temperature: float) -> float:
        total = torch.zeros((), dtype=torch.float64, device=features.mesh.device)
        for logits, label in kept if kept is not None else look():
            scale = np.exp(-log_temperature)
            total += (normaliser(logits.double() * scale, link) - label * scale).sum()
        return float(together(features.mesh, total)) / len(rows)

    bounds = (np.log(_COLDEST), np.log(_HOTTEST))
    return float(np.exp(minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The number k of the bin (k/15, (k+1)/15] of each confidence; 0 belongs to the first. int64 [n]."""
    return np.maximum(np.searchsorted(_EDGES, confidence, side="left") - 1, 0)


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[Any]]:
    """Of each bin: the number of images, their mean confidence and accuracy (None in an empty one)."""
    bins = bin_of(confidence)
    counts = np.bincount(bins, minlength=BINS)

    def means(values: np.ndarray) -> list[Any]:
        sums = np.bincount(bins, values, minlength=BINS)
        return [float(total / n) if n else None for total, n in zip(sums, counts, strict=True)]

    return {"count": counts.tolist(), "confidence": means(confidence), "accuracy": means(right)}


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean over images of |accuracy - confidence| of their bin."""
    gaps = np.bincount(bin_of(confidence), right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _numbers(scores: Scores, rows: np.ndarray) -> dict[str, float]:
    if not len(rows):
        return {"ece": float("nan"), "nll": float("nan"), "brier": float("nan")}
    return {
        "ece": expected_calibration_error(scores.confidence[rows], scores.top1[rows]),
        "nll": float(scores.nll[rows].mean()),
        "brier": float(scores.brier[rows].mean()),
    }


def _measure(
    scores: Scores, rows: np.ndarray, suffix: str, settings: dict[str, Any]
) -> Iterator[Measurement]:
    confidence, right = scores.confidence[rows], scores.top1[rows]
    bins = bin_of(confidence)

    def drawn_again(counts: np.ndarray) -> np.ndarray:
        gaps = np.bincount(bins, counts * (right - confidence), minlength=BINS)
        return np.abs(gaps).sum(keepdims=True) / len(rows)

    errors = {
        "ece": float(standard_error.bootstrap(drawn_again, len(rows))[0]) if len(rows) > 1 else None,
        "nll": standard_error.of_mean(scores.nll[rows]),
        "brier": standard_error.of_mean(scores.brier[rows]),
    }
    count = Count(scores.count.given, len(rows), scores.count.bad)
    more = {"ece": {"bins": BINS, "reliability": reliability(confidence, right)}}
    for name, value in _numbers(scores, rows).items():
        yield Measurement(
            name + suffix,
            value,
            count,
            errors[name],
            higher_is_better=False,
            settings={**settings, **more.get(name, {})},
        )
