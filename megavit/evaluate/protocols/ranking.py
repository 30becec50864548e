"""Which predictions are right, counted over the ranks.

Letters: m rows of a piece, C classes of the label space, M labels of an image at most, H probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.protocols.rows import Share
from megavit.evaluate.results import Count, Measurement
from megavit.evaluate.sets.image_set import ImageSet
from megavit.parallel.collectives import sum_over_world

TOPS = (1, 5)


def right_in_top(scores: Tensor, rows: np.ndarray, images: ImageSet) -> Tensor:
    """Whether a label is among the k candidates of the highest score, for each k of `TOPS`.

    Equal scores are in the order of the class ids. A class of score -inf or NaN is never predicted.

    Args:
        scores: [..., m, C].
        rows: the images' numbers, int64 [m].

    Returns:
        bool [len(TOPS), ..., m]; false where the image has no label.
    """
    labels = torch.from_numpy(images.labels[rows]).to(scores.device)  # [m, M]
    if images.candidates is not None:
        allowed = torch.full((scores.shape[-1],), -math.inf, dtype=scores.dtype, device=scores.device)
        allowed[torch.from_numpy(images.candidates).to(scores.device)] = 0
        scores = scores + allowed
    ids = torch.arange(scores.shape[-1], device=scores.device)
    place = torch.full(scores.shape[:-1], scores.shape[-1], device=scores.device)
    for label in labels.T:  # [m]
        index = label.clamp_min(0)[:, None]
        own = scores.gather(-1, index.expand(*scores.shape[:-1], 1))
        before = (scores > own) | ((scores == own) & (ids < index))
        valid = (label >= 0) & (own[..., 0] > -math.inf)
        place = torch.where(valid, torch.minimum(place, before.sum(-1)), place)
    return torch.stack([place < k for k in TOPS])


def require_same_classes(train: Features, test: Features) -> None:
    """ValueError unless what is learnt on `train` can be scored on `test`."""
    if (train.set.space, train.layer, train.dim) != (test.set.space, test.layer, test.dim):
        raise ValueError(
            f"what is learnt on {train.set.name} (classes of {train.set.space}, {train.layer}, width "
            f"{train.dim}) cannot be scored on {test.set.name} ({test.set.space}, {test.layer}, {test.dim})"
        )


def score(test: Features, probes: Sequence[LinearProbe]) -> Tensor:
    """The number of images that each of H probes has right in the top k, float64 [len(TOPS), H]. Collective;
    each rank classifies its share of the images."""
    right = torch.zeros(len(TOPS), len(probes), dtype=torch.float64, device=test.mesh.device)
    for rows, values in Share(test).chunks(test.dim + 2 * len(test.set.class_names)):
        for number, probe in enumerate(probes):
            right[:, number] += right_in_top(probe(values), rows, test.set).sum(-1)
    return sum_over_world(test.mesh, right)


def count_of(test: Features) -> Count:
    """The images of a test set: used are those with features and a label."""
    used = (test.labels[test.usable] >= 0).any(1).sum()
    return Count(len(test.set), int(used), int(test.bad.sum()))


def tops(
    train: Features, test: Features, right: Tensor, settings: Mapping[str, Any]
) -> Iterator[Measurement]:
    """top1 and top5 with binomial standard errors, from the numbers of right images, [len(TOPS)]. No top5
    where there are not more than five classes to choose from."""
    count = count_of(test)
    choices = len(test.set.class_names) if test.set.candidates is None else len(test.set.candidates)
    for k, number in zip(TOPS, right.tolist(), strict=True):
        if count.used and (k == 1 or choices > k):
            share = number / count.used
            stderr = standard_error.of_share(share, count.used)
            yield Measurement(f"top{k}", share, count, stderr, settings=dict(settings), data=test.set.name)
