"""k nearest neighbours: a test image is of the class of the training images most like it.

The cosine similarities of the k nearest vote with weights softmax(similarity / T) (Wu et al., 2018, arXiv
1805.01978; the values of k and T are DINOv2's). Nothing is learnt, so this tells most about the features.

Each rank searches its own training rows, and only the numbers of the best are exchanged.

Letters: m queries, n training rows of a chunk, D width of the features, C classes, K of k at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.ranking import TOPS, require_same_classes, right_in_top, tops
from megavit.evaluate.protocols.rows import Share, single_labels
from megavit.evaluate.results import Measurement
from megavit.parallel.collectives import gather_over_world, max_over_world, sum_over_world
from megavit.parallel.mesh import Mesh

_QUERIES = 1024  # that are compared at once
_UNIT = 1 << 30  # similarities are whole multiples of 1 / _UNIT
_LAST_ROW = (1 << 32) - 1
_NOTHING = torch.iinfo(torch.int64).min


def knn(
    train: Features,
    tests: Sequence[Features],
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> Iterator[Measurement]:
    """top1 and top5 for each k on each test set.

    With a k above the number of training images all of them vote; the setting `neighbors` says how many.
    Collective. Costs a product of all test features with this rank's training features, in float64.
    """
    labels = torch.from_numpy(single_labels(train)).to(train.mesh.device)
    share, most = Share(train), min(max(ks), len(train.usable))
    for test in tests:
        require_same_classes(train, test)
        right = torch.zeros(len(TOPS), len(ks), dtype=torch.float64, device=train.mesh.device)
        for rows, values in test.everywhere():
            for start in range(0, len(rows), _QUERIES):
                part = slice(start, start + _QUERIES)
                similarities, found = nearest(share, values[part], most)
                # All ranks know the neighbours of all queries; each counts the votes on its share.
                own = slice(train.mesh.global_rank, None, train.mesh.world_size)
                weights = (similarities[own] / temperature).softmax(1)
                mine = rows[part][own]
                for i, k in enumerate(ks):
                    votes = _votes(weights[:, :k], labels[found[own, :k]], len(train.set.class_names))
                    right[:, i] += right_in_top(votes, mine, test.set).sum(-1)
        right = sum_over_world(train.mesh, right)
        for i, k in enumerate(ks):
            settings = {"k": k, "neighbors": min(k, most), "temperature": temperature, "layer": train.layer}
            yield from tops(train, test, right[:, i], settings)


def nearest(train: Features | Share, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k training images that are most like each query, best first.

    Similarities are rounded to 2^-30, equal ones are in the order of the rows: the result does not depend on
    which rank holds which row.

    Args:
        train: the features, or, for several calls, `Share(features)`, which keeps them in memory.
        queries: [m, D], the same on every rank.

    Returns:
        Cosine similarities, float64 [m, k], and rows, int64 [m, k], the same on every rank. Where there are
        fewer than k training images, -inf and -1 fill up. Collective: one gather of m times k numbers.
    """
    share = train if isinstance(train, Share) else Share(train)
    queries = _normalized(queries) * _UNIT
    best = torch.full((len(queries), k), _NOTHING, device=queries.device)
    for rows, values in share.chunks(share.features.dim + 2 * len(queries)):
        best = torch.cat([best, _keys(queries @ _normalized(values).T, rows)], 1).topk(k).values
    return _best_of_world(share.mesh, best, k)


def highest(mesh: Mesh, values: Tensor, rows: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest`, for values of any size, float64 [m, n], of the rows that this rank has, int64 [n]; they
    are rounded to 2^-30 of the largest of each line. Collective: one all-reduce of m numbers and one gather
    of m times k."""
    scale = values.abs().amax(1) if len(rows) else values.new_zeros(len(values))
    scale = max_over_world(mesh, scale)[:, None].clamp_min(torch.finfo(torch.float64).tiny)
    best = torch.full((len(values), k), _NOTHING, device=values.device)
    keys = _keys(values / scale * _UNIT, rows)
    found, chosen = _best_of_world(mesh, torch.cat([best, keys], 1).topk(k).values, k)
    return found * scale, chosen


def _best_of_world(mesh: Mesh, best: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of all ranks' keys [m, k], as values in units and rows."""
    everyones = gather_over_world(mesh, best)  # [world, m, k]
    best = everyones.transpose(0, 1).flatten(1).topk(k).values
    values = (best >> 32).double() / _UNIT
    missing = best == _NOTHING
    return values.masked_fill_(missing, -math.inf), (_LAST_ROW - (best & _LAST_ROW)).masked_fill_(missing, -1)


def _keys(products: Tensor, rows: np.ndarray) -> Tensor:
    """Similarity and row as one whole number, int64 [m, n]: the upper half orders by similarity, the lower
    half puts smaller rows first. A float64 product is exact to far less than the step of the rounding, so
    that the order of the summation, which differs with the number of rows, does not show."""
    keys = products.round_().to(torch.int64).bitwise_left_shift_(32)
    return keys.add_(_LAST_ROW - torch.from_numpy(rows).to(keys.device))


def _normalized(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values.double(), dim=1)


def _votes(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The sum of the neighbours' weights for each class, -inf for classes without a vote: [m, C]."""
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)
    voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels, True)
    return votes.masked_fill_(~voted, -math.inf)
