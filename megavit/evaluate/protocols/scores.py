"""What the logits say of every image: a few numbers each, on every rank, in the order of the images.

The logits of 50,000 images over 29,593 classes are 6 GB and are never held or gathered: one pass over this
rank's features makes the numbers, and one sum over the data-parallel ranks brings them together. All that
follows (accuracy, calibration, risk and coverage, detection) is numpy on these arrays, the same at any number
of ranks.

Letters: n images, m rows of a piece, D width of the features, C outputs of the classifier, K classes that may
be predicted, M labels of an image at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from megavit.evaluate.features import Features, Piece
from megavit.evaluate.results import Count
from megavit.parallel.collectives import broadcast_over_tp, sum_over_dp
from megavit.parallel.mesh import Mesh

LogitsOf = Callable[[Tensor], Tensor]  # [m, D] -> [m, C]
Link = Literal["softmax", "sigmoid"]

# Logits that are looked at in one go: 64 MB in float64, and a few times that for what is made of them.
_ELEMENTS = 1 << 23
_SEEN = "seen"
_NEEDS_LABEL = ("top1", "top5", "nll", "brier")
_COLUMNS = ("max_logit", "logsumexp", "confidence", "predicted", "entropy", *_NEEDS_LABEL, _SEEN)


@dataclass(frozen=True)
class Scores:
    """Per-image numbers, float64 [n] unless said otherwise; NaN where an image could not be read, and in the
    columns of the label (from `top1` on) where it has none.

    With several right labels (ReaL), "the label" of `nll` and `brier` is the one with the highest logit.

    Args:
        link: what made probabilities p of the logits z: softmax over the K classes, or a sigmoid of each.
        classes: K.
        multi_label: whether several labels apply to an image (`ImageSet.right` is "all").
        scored: bool [n], the images that count: readable and, where there are labels, with one.
        count: of the images.
        max_logit: the highest logit.
        logsumexp: of the K logits. It is minus the (free) energy at temperature 1.
        confidence: p of the prediction.
        predicted: its class id, int64 [n], -1 where the image could not be read.
        entropy: of p, in nats; with sigmoid the sum over the K binary entropies.
        top1: 1 if the prediction is among the labels, else 0.
        top5: 1 if one of the five likeliest classes is.
        nll: -log p of the label; with sigmoid the sum over the K binary cross-entropies.
        brier: the sum over K of (p - [it is the label])^2.
    """

    link: Link
    classes: int
    multi_label: bool
    scored: np.ndarray
    count: Count
    max_logit: np.ndarray
    logsumexp: np.ndarray
    confidence: np.ndarray
    predicted: np.ndarray
    entropy: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    nll: np.ndarray
    brier: np.ndarray


@torch.no_grad()
def score(features: Features, logits_of: LogitsOf, link: Link, *, labelled: bool = True) -> Scores:
    """Look at the logits of every image of a set once.

    Args:
        features: of the set.
        logits_of: the classifier, [m, D] -> [m, C]; the ranks of a TP group call it together.
        link: see `Scores`.
        labelled: False for a set of another label space (out-of-distribution images): its labels and
            candidates mean nothing to this classifier.

    Raises ValueError, on all ranks, if a label is not an output of the classifier or a logit is not finite.
    Collective: one all-reduce of [n, 10] float64.
    """
    targets, candidates, classes = targets_of(features, logits_of, labelled)
    table = torch.zeros(len(targets), len(_COLUMNS), dtype=torch.float64, device=features.mesh.device)
    for rows, logits in logits_in_pieces(features, logits_of, candidates, classes):
        numbers = _look(logits, torch.from_numpy(targets[rows]).to(logits.device), link)
        table[torch.from_numpy(rows).to(table.device)] = torch.stack([numbers[name] for name in _COLUMNS], 1)
    found = dict(zip(_COLUMNS, together(features.mesh, table).T.copy(), strict=True))
    return _scores(features, targets, candidates, found, link, classes, labelled)


def targets_of(
    features: Features, logits_of: LogitsOf, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The labels as places among the K classes that may be predicted, int64 [n, M], -1 for none; these
    classes (None: all); and K. Raises ValueError if a label is none of them."""
    images, device = features.set, features.mesh.device
    outputs = logits_of(torch.zeros(1, features.dim, device=device)).shape[1]
    if not labelled:
        return np.full((len(images), 1), -1, np.int64), None, outputs
    named = [images.labels] if images.candidates is None else [images.labels, images.candidates]
    highest = max(int(ids.max(initial=-1)) for ids in named)
    if highest >= outputs:
        raise ValueError(
            f"{images.name} has class ids up to {highest}, but the classifier has only {outputs} outputs; "
            f"evaluate a model of the label space '{images.space}', or use a protocol that trains a head"
        )
    if images.candidates is None:
        return images.labels, None, outputs
    place = np.full(outputs + 1, -1, np.int64)  # the last one is for -1, no label
    place[images.candidates] = np.arange(len(images.candidates))
    targets = place[images.labels]
    lost = (images.labels >= 0).any(1) & (targets < 0).all(1)
    if lost.any():
        first = int(np.flatnonzero(lost)[0])
        raise ValueError(
            f"{images.name}: {lost.sum()} of {len(images)} images have only labels outside its "
            f"{len(images.candidates)} candidates, e.g. {images.images.key(first)} "
            f"({images.class_names[images.labels[first].max()]}); its labels look unmapped"
        )
    return targets, images.candidates, len(images.candidates)


def logits_in_pieces(
    features: Features, logits_of: LogitsOf, candidates: np.ndarray | None, classes: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """This rank's rows, int64 [m], and their logits over the candidates, float64 [m, K]: m is small enough
    that a piece of any K fits."""
    chosen = None if candidates is None else torch.from_numpy(candidates).to(features.mesh.device)
    for rows, values in small_pieces(features.mine(), classes):
        logits = logits_of(values)
        yield rows, (logits if chosen is None else logits[:, chosen]).double()


def small_pieces(pieces: Iterator[Piece], width: int) -> Iterator[Piece]:
    """The same rows in pieces so small that `width` float64 a row can be held."""
    step = max(1, _ELEMENTS // width)
    for rows, values in pieces:
        for start in range(0, len(rows), step):
            yield Piece(rows[start : start + step], values[start : start + step])


def together(mesh: Mesh, local: Tensor) -> np.ndarray:
    """The sum over the data-parallel ranks, the same bits on every rank: a TP group's ranks may differ in the
    last bit of a logit, and must not take different decisions for it. Collective."""
    return broadcast_over_tp(mesh, sum_over_dp(mesh, local)).cpu().numpy()


def normaliser(logits: Tensor, link: Link) -> Tensor:
    """A of [m, K] logits, [m]: a label's negative log-likelihood is A minus its logit, under either link."""
    return logits.logsumexp(1) if link == "softmax" else softplus(logits).sum(1)


def _look(logits: Tensor, targets: Tensor, link: Link) -> dict[str, Tensor]:
    """The columns of m images from float64 logits [m, K] and targets [m, M]."""
    top = logits.topk(min(5, logits.shape[1])).indices  # [m, 5]
    logsumexp, base = logits.logsumexp(1), normaliser(logits, link)
    p = (logits - logsumexp[:, None]).exp() if link == "softmax" else logits.sigmoid()
    known = targets >= 0
    label_logit, which = (
        logits.gather(1, targets.clamp(min=0)).masked_fill(~known, -torch.inf).max(1)
    )  # of the likeliest label
    label = targets.gather(1, which[:, None]).clamp(min=0)
    right = ((targets[:, :, None] == top[:, None, :]) & known[:, :, None]).any(1).double()  # [m, 5]
    return {
        "max_logit": logits.gather(1, top[:, :1])[:, 0],
        "logsumexp": logsumexp,
        "confidence": p.gather(1, top[:, :1])[:, 0],
        "predicted": top[:, 0].double(),
        "entropy": base - (p * logits).sum(1),
        "top1": right[:, 0],
        "top5": right.amax(1),
        "nll": torch.where(known.any(1), base - label_logit, 0.0),
        "brier": (p * p).sum(1) - 2 * p.gather(1, label)[:, 0] + 1,
        _SEEN: torch.ones_like(logsumexp),
    }


def _scores(
    features: Features,
    targets: np.ndarray,
    candidates: np.ndarray | None,
    found: dict[str, np.ndarray],
    link: Link,
    classes: int,
    labelled: bool,
) -> Scores:
    """From the columns that all ranks have together."""
    usable, has_label = ~features.bad, (targets >= 0).any(1)
    assert np.array_equal(found.pop(_SEEN), usable.astype(float)), "an image was on no rank, or on several"
    broken = usable & ~np.isfinite(sum(found[name] for name in ("logsumexp", "entropy", "nll")))
    if broken.any():
        key = features.set.images.key(int(np.flatnonzero(broken)[0]))
        raise ValueError(
            f"{features.set.name}: the logits of {broken.sum()} of {usable.sum()} images are not finite, "
            f"e.g. of {key}; the weights or the features ({features.layer}) hold NaN or overflow"
        )
    predicted = found.pop("predicted").astype(np.int64)
    predicted = np.where(usable, predicted if candidates is None else candidates[predicted], -1)
    for name, values in found.items():
        values[~(usable & has_label if name in _NEEDS_LABEL else usable)] = np.nan
    scored = usable & has_label if labelled else usable
    count = Count(len(usable), int(scored.sum()), int(features.bad.sum()))
    multi_label = labelled and features.set.right == "all"
    return Scores(link, classes, multi_label, scored, count, predicted=predicted, **found)
