"""How much accuracy an image's corruption costs: ImageNet-C's mCE, and the like on a set of one's own.

CE_c = sum over severities of the errors / the same sum of AlexNet's, and mCE is the mean over the 15
corruptions (Hendrycks & Dietterich, ICLR 2019). The relative one takes the clean error off every error first.
Both divide sums: a mean of the five severities' ratios is another number. AlexNet has 1.0 in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavit.evaluate.protocols.scores import Scores
from megavit.evaluate.results import Count, Measurement

SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 errors of AlexNet at severities 1 to 5, of 50,000 images each, as facebookresearch/dinov3 (6876159)
# has them in eval/metrics/imagenet_c.py. Their means are those of the CE normalisers in hendrycks/robustness.
ALEXNET = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
# Not part of the mean, from the same place.
ALEXNET_EXTRA = {
    "speckle_noise": (0.66192, 0.74440, 0.90246, 0.94548, 0.97268),
    "gaussian_blur": (0.54732, 0.70444, 0.82574, 0.89864, 0.95940),
    "spatter": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "saturate": (0.59342, 0.65514, 0.51174, 0.70834, 0.82260),
}
ALEXNET_CLEAN = 0.43478  # 1 - acc@1 of torchvision's AlexNet_Weights.IMAGENET1K_V1


@dataclass(frozen=True)
class Outcome:
    """Which images of a set were mistaken: float64 [n], 1 if so, NaN where an image does not count."""

    wrong: np.ndarray
    count: Count

    @property
    def error(self) -> float:
        return float(np.nanmean(self.wrong)) if self.count.used else float("nan")


Parts = Mapping[tuple[str, int], Outcome]  # by corruption and severity


def outcome(scores: Scores) -> Outcome:
    """All that a corrupted set leaves behind: 95 sets of 50,000 images are 38 MB."""
    return Outcome(np.where(scores.scored, 1 - scores.top1, np.nan), scores.count)


def imagenet_c(parts: Parts, clean: Outcome | None = None) -> Iterator[Measurement]:
    """mce, and relative_mce if there is the `clean` validation set's outcome, of the 15 corruptions;
    corrupted_accuracy, their mean accuracy; and mce_extra if all of the 4 extra ones are there.

    CE and accuracy by corruption and severity are in the settings of mce. Raises ValueError naming the
    corruptions and severities that are missing: a mean of fewer is not mCE.

    The standard errors take into account that the parts hold the same images, in one order; those of the
    clean set may come in another, so that relative_mce's is somewhat too large.
    """
    _refuse_missing(parts, ALEXNET)
    settings = {"reference": "AlexNet", "corruptions": len(ALEXNET), "severities": len(SEVERITIES)}
    more = {"ce": _corruption_errors(parts, ALEXNET), "accuracy": accuracy_table(parts)}
    yield _mean("mce", parts, _weights(ALEXNET), {**settings, **more})
    if clean is not None:
        yield _relative(parts, clean, settings)
    yield _accuracy(parts, tuple(ALEXNET), settings)
    if all((name, severity) in parts for name in ALEXNET_EXTRA for severity in SEVERITIES):
        extra = {
            **settings,
            "corruptions": len(ALEXNET_EXTRA),
            "ce": _corruption_errors(parts, ALEXNET_EXTRA),
        }
        yield _mean("mce_extra", parts, _weights(ALEXNET_EXTRA), extra)


def corrupted(parts: Parts, clean: Outcome) -> Iterator[Measurement]:
    """Of a set of one's own, whose images were corrupted on the fly: corrupted_accuracy, the mean over
    corruptions and severities, and corruption_drop, the share of the clean accuracy that is lost.

    There is no AlexNet of this set, so none of them is an mCE. All parts hold the images of `clean`, in its
    order.
    """
    names = tuple(dict.fromkeys(name for name, _ in parts))
    settings: dict[str, Any] = {"corruptions": list(names), "clean_accuracy": 1 - clean.error}
    yield _accuracy(parts, names, {**settings, "accuracy": accuracy_table(parts)})
    kept, before = 1 - float(np.mean([part.error for part in parts.values()])), 1 - clean.error
    if not before:
        return
    # The drop 1 - kept / before, to first order in the errors.
    weights = {key: 1 / (len(parts) * before) for key in parts}
    influence = _influence(parts, weights) - kept / before**2 * _deviation(clean)
    yield Measurement(
        "corruption_drop",
        1 - kept / before,
        _total([clean, *parts.values()]),
        float(np.sqrt(np.sum(influence**2))),
        higher_is_better=False,
        settings=settings,
    )


def accuracy_table(parts: Parts) -> dict[str, list[float]]:
    """The accuracies at the severities from 1 on, by corruption, for a plot."""
    table: dict[str, list[float]] = {}
    for (name, _), part in sorted(parts.items(), key=lambda item: item[0][1]):
        table.setdefault(name, []).append(1 - part.error)
    return table


def _weights(alexnet: Mapping[str, tuple[float, ...]]) -> dict[tuple[str, int], float]:
    """What the error of each part is multiplied with in the mean CE."""
    return {
        (name, severity): 1 / (len(alexnet) * sum(errors))
        for name, errors in alexnet.items()
        for severity in SEVERITIES
    }


def _corruption_errors(parts: Parts, alexnet: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """CE of every corruption."""
    return {
        name: sum(parts[name, severity].error for severity in SEVERITIES) / sum(errors)
        for name, errors in alexnet.items()
    }


def _relative(parts: Parts, clean: Outcome, settings: dict[str, Any]) -> Measurement:
    above = {name: sum(errors) - len(errors) * ALEXNET_CLEAN for name, errors in ALEXNET.items()}
    weights = {key: 1 / (len(above) * above[key[0]]) for key in _weights(ALEXNET)}
    of_clean = sum(weights.values())
    value = sum(weight * (parts[key].error - clean.error) for key, weight in weights.items())
    spread = np.sum(_influence(parts, weights) ** 2) + np.sum((of_clean * _deviation(clean)) ** 2)
    return Measurement(
        "relative_mce",
        float(value),
        _total([clean, *(parts[key] for key in weights)]),
        float(np.sqrt(spread)),
        higher_is_better=False,
        settings={**settings, "clean_error": clean.error},
    )


def _mean(
    metric: str, parts: Parts, weights: Mapping[tuple[str, int], float], settings: dict[str, Any]
) -> Measurement:
    """A weighted sum of errors."""
    return Measurement(
        metric,
        float(sum(weight * parts[key].error for key, weight in weights.items())),
        _total([parts[key] for key in weights]),
        float(np.sqrt(np.sum(_influence(parts, weights) ** 2))),
        higher_is_better=False,
        settings=settings,
    )


def _accuracy(parts: Parts, names: tuple[str, ...], settings: dict[str, Any]) -> Measurement:
    chosen = {key: part for key, part in parts.items() if key[0] in names}
    weights = dict.fromkeys(chosen, 1 / len(chosen))
    return Measurement(
        "corrupted_accuracy",
        1 - float(np.mean([part.error for part in chosen.values()])),
        _total(list(chosen.values())),
        float(np.sqrt(np.sum(_influence(chosen, weights) ** 2))),
        settings=settings,
    )


def _deviation(part: Outcome) -> np.ndarray:
    """What each image moves the mean error by: its square sum is the mean's variance. float64 [n]."""
    return np.nan_to_num(part.wrong - part.error) / max(1, part.count.used)


def _influence(parts: Parts, weights: Mapping[tuple[str, int], float]) -> np.ndarray:
    """What each image moves the weighted sum of errors by, if all parts hold the same images; else what each
    image of each part does."""
    moves = [weight * _deviation(parts[key]) for key, weight in weights.items()]
    same = len({len(move) for move in moves}) == 1
    return np.sum(moves, axis=0) if same else np.concatenate(moves)


def _total(parts: list[Outcome]) -> Count:
    return Count(*np.sum([part.count for part in parts], axis=0).tolist())


def _refuse_missing(parts: Parts, alexnet: Mapping[str, tuple[float, ...]]) -> None:
    missing = [
        f"{name}/{severity}" for name in alexnet for severity in SEVERITIES if (name, severity) not in parts
    ]
    empty = [f"{name}/{severity}" for (name, severity), part in parts.items() if not part.count.used]
    for what, keys in (("lacks", missing), ("has no readable labelled image in", empty)):
        if keys:
            raise ValueError(f"ImageNet-C {what} {len(keys)} of its 75 parts: {', '.join(keys[:8])}")
