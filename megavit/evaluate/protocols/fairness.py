"""Does a binary prediction treat two groups alike? Accuracy and rate of positive predictions by group."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torchmetrics.functional.classification import binary_groups_stat_rates

from megavit.evaluate.protocols import standard_error
from megavit.evaluate.results import Count, Measurement

CAVEAT = (
    "These figures test a technical claim only: how a model's accuracy and its rate of positive predictions "
    "differ between two annotated groups. CelebA's labels are annotators' impressions, a binary gender is "
    "neither everybody's nor visible in a picture, and attractiveness is no property of a person. They do "
    "not endorse predicting any of this, and say nothing about whether a use of the model is fair."
)

_RESAMPLES = 1000


def fairness(
    predicted: np.ndarray, target: np.ndarray, group: np.ndarray, *, target_name: str, group_name: str
) -> Iterator[Measurement]:
    """accuracy_gap and positive_rate_gap (highest minus lowest group; the latter is demographic parity),
    their ratios (lowest / highest), and accuracy and positive rate of every group.

    Args:
        predicted: int64 [n], 0 or 1, -1 for an image without a prediction (it could not be read).
        target: int64 [n], 0 or 1.
        group: int64 [n], the group of each image by any numbers, -1 for none.
        target_name: what is predicted, e.g. Smiling.
        group_name: what tells the groups apart, e.g. Male.

    The caveat is in the settings of every number. Standard errors of gaps and ratios are by bootstrap.
    """
    used = (predicted >= 0) & (target >= 0) & (group >= 0)
    count = Count(len(target), int(used.sum()), int((predicted < 0).sum()))
    settings = {"target": target_name, "group": group_name, "caveat": CAVEAT}
    names, place = np.unique(group[used], return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{group_name} has {len(names)} groups among {count.used} images; gaps need two")
    if max(predicted[used].max(), target[used].max()) > 1:
        raise ValueError(f"{target_name} has more than the classes 0 and 1")
    sizes = np.bincount(place)
    rates = group_rates(predicted[used], target[used], place)  # [groups, 4]: tp, fp, tn, fn
    values, errors = _gaps(rates[None])[0], _errors(rates, sizes)
    metrics = ("accuracy_gap", "accuracy_ratio", "positive_rate_gap", "positive_rate_ratio")
    for metric, value, error in zip(metrics, values, errors, strict=True):
        stderr = None if np.isnan(error) else float(error)
        yield Measurement(metric, float(value), count, stderr, metric.endswith("ratio"), settings)
    for name, size, (accuracy, positive) in zip(names, sizes.tolist(), _shares(rates), strict=True):
        of_group = Count(size, size, 0)
        for metric, value in (("accuracy", float(accuracy)), ("positive_rate", float(positive))):
            error = standard_error.of_share(value, size)
            yield Measurement(f"{metric}[{group_name}={name}]", value, of_group, error, settings=settings)


def group_rates(predicted: np.ndarray, target: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The shares of true and false positives, true and false negatives in each group, numbered from 0 without
    gaps. float64 [groups, 4]."""
    hits, truth, place = (torch.from_numpy(np.ascontiguousarray(ids)) for ids in (predicted, target, group))
    found = binary_groups_stat_rates(hits, truth, place, num_groups=int(group.max()) + 1)
    return np.stack([rates.double().numpy() for rates in found.values()])


def _shares(rates: np.ndarray) -> np.ndarray:
    """Accuracy and positive rate of [..., 4] rates: [..., 2]."""
    return np.stack([rates[..., 0] + rates[..., 2], rates[..., 0] + rates[..., 1]], -1)


def _gaps(rates: np.ndarray) -> np.ndarray:
    """Gap and ratio of accuracy, then of the positive rate, of rates [R, groups, 4]: [R, 4]."""
    shares = _shares(rates)
    highest, lowest = shares.max(1), shares.min(1)
    with np.errstate(invalid="ignore"):  # no positive prediction in any group: no ratio
        ratio = lowest / highest
    return np.stack([highest[:, 0] - lowest[:, 0], ratio[:, 0], highest[:, 1] - lowest[:, 1], ratio[:, 1]], 1)


def _errors(rates: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Standard errors of `_gaps`, by drawing each group's images anew: only how many fall into each of the
    four cells matters, which is multinomial. NaN for a ratio that some draw does not have."""
    generator = np.random.default_rng(0)
    exact = np.rint(rates * sizes[:, None]) / sizes[:, None]
    drawn = [
        generator.multinomial(size, row, _RESAMPLES) / size for size, row in zip(sizes, exact, strict=True)
    ]
    return np.std(_gaps(np.stack(drawn, 1)), axis=0, ddof=1)
