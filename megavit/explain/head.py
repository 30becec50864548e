"""How the classifier depends on each training image: gradients, Hessian and influence in closed form.

The logits are z = W h + b, and the gradient of an image's loss with respect to them is e = p - y, for softmax
and for sigmoid. With respect to (W, b) it is the outer product of e and h~ = (h, 1). For a score whose
gradient with respect to (W, b) is G, the two measures of what a training image does to it are

    tracin      - G . (e h~)            how far a step of gradient descent on the image raises the score
    influence   - G . H^-1 (e h~) / n   how far the score would fall if the classifier were fitted without it

(Pruthi et al., 2020, arXiv 2002.08484; Koh and Liang, 2017, 1703.04730). H is the Hessian of the mean loss,
the mean of A (x) h~ h~^T with A = diag(p) - p p^T for softmax and diag(p (1 - p)) for sigmoid, plus damping
on its diagonal. H^-1 G comes from conjugate gradients, which need products with H only: no matrix of (K D)^2
numbers.

Letters: n training images, r of a chunk, m scores, D width of the features, K classes, s rows of W that a
score is followed in, u those of all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.rows import Share
from megavit.parallel.collectives import sum_over_world
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import Loss
from megavit.tasks.loss import local_targets

Measure = Literal["tracin", "influence"]
MOST_CLASSES = 64  # rows of W in which a score is followed
_CHUNK_NUMBERS = 1 << 22  # logits that are computed at once
_TOLERANCE, _MOST_STEPS = 1e-8, 500  # of the conjugate gradients


class Scores(NamedTuple):
    """What training images raise or lower: m functions of (W, b), by their gradients.

    `classes` int64 [m, s] are the rows of (W, b) in which they are followed, `gradient` float64 [m, s, D + 1]
    their gradients there. `kept` [m] is the share of the squared gradient that lies in these rows.
    """

    classes: Tensor
    gradient: Tensor
    kept: Tensor

    @staticmethod
    def of(
        features: Tensor, logits: Tensor, by_logit: Tensor, loss: Loss, most: int = MOST_CLASSES
    ) -> Scores:
        """Of images with `features` [m, D] and `logits` [m, K], from the scores' gradients with respect to
        the logits, [m, K].

        With sigmoid the classes of other gradients than 0 are followed; with softmax, whose Hessian couples
        all classes, the likeliest ones too. All, if there are no more than `most`.
        """
        by_logit = by_logit.double()
        weight, used = by_logit.abs(), int((by_logit != 0).sum(1).max())
        if loss == "softmax":
            weight, used = weight + logits.double().softmax(1), by_logit.shape[1]
        classes = weight.topk(min(used, most), 1).indices.sort(1).values
        kept = by_logit.gather(1, classes).square().sum(1) / by_logit.square().sum(1)
        return Scores(
            classes,
            by_logit.gather(1, classes)[:, :, None] * with_one(features)[:, None],
            kept.nan_to_num(1.0),
        )


class Values(NamedTuple):
    """Of this rank's training images: `values` float64 [m, rows] and their numbers, int64; and how the values
    were found."""

    values: Tensor
    rows: np.ndarray
    settings: dict[str, Any]


class HeadInfluence:
    """The training images' part in a classifier.

    Nothing is brought together but sums of [m, s, D + 1] numbers: each rank works on its own rows, the ranks
    of a TP group on different ones. What it holds is the probabilities and errors of all its images for u
    classes, 8 n u bytes over the data-parallel ranks, and the features if they are few (`Share`). All methods
    are collective.

    Args:
        train: the pooled features, with the labels that the classifier was fitted to.
        logits: the classifier, float32 [b, D] -> [b, K]; the ranks of a TP group call it with the same rows.
        loss: that it was fitted with. Label smoothing and blends (mixup) are not considered.
    """

    def __init__(self, train: Features, logits: Callable[[Tensor], Tensor], loss: Loss):
        self.train, self.mesh, self.loss = train, train.mesh, loss
        self._logits, self._share = logits, Share(train)
        # With softmax an image without a label has no loss.
        self._used = ~train.bad if loss == "sigmoid" else ~train.bad & (train.labels >= 0).any(1)
        self._count = int(self._used.sum())
        if not self._count:
            raise ValueError(f"{train.set.name}: none of {len(train.set)} images can be used")

    def values(self, scores: Scores, measure: Measure = "tracin", damping: float = 1.0) -> Values:
        """What each training image does to the scores. Positive: it raises them.

        With `influence` they are in the units of the score. `damping` is the share of the mean of the
        Hessian's diagonal that is added to it. In the Hessian the rows of W outside of `scores.classes` are
        taken as fixed: with sigmoid that changes nothing, with softmax it is an approximation if there are
        more classes than rows.

        On digits `tracin` ranks best with the model's own features, `influence` with raw pixels; more damping
        brings the order of `influence` nearer to that of `tracin`.

        Cost: one pass over the logits, n K D products; one over the features for tracin, m n s D; for
        influence two more a step of the conjugate gradients, some 20 to 200, each with one all-reduce of
        m s (D + 1) numbers.
        """
        held = _Held(self, scores.classes)
        settings: dict[str, Any] = {
            "measure": measure,
            "classes": scores.classes.shape[1],
            "kept": round(float(scores.kept.min()), 6),
        }
        followed = scores.gradient
        if measure == "influence":
            followed, steps, residual = self._solve(held, followed, damping)
            followed = followed / self._count
            settings |= {"damping": damping, "steps": steps, "residual": residual}
        parts, rows = [followed.new_zeros(len(followed), 0)], [np.zeros(0, np.int64)]
        for chunk in held.chunks(self._share):
            parts.append(-((followed @ chunk.inputs.T) * chunk.errors).sum(1))
            rows.append(chunk.rows)
        return Values(torch.cat(parts, 1), np.concatenate(rows), settings)

    def own(self) -> Values:
        """The influence of each training image on its own loss as TracIn has it, |e|^2 |h~|^2: [1, rows].
        Large for images that the classifier does not explain."""
        parts, rows = [torch.zeros(0, dtype=torch.float64, device=self.mesh.device)], [np.zeros(0, np.int64)]
        for number, (chunk, values, _, errors) in enumerate(self.predictions()):
            # The ranks of a TP group have the same rows: they take turns.
            if number % self.mesh.tp_size == self.mesh.tp_rank:
                parts.append(errors.square().sum(1) * with_one(values).square().sum(1))
                rows.append(chunk)
        return Values(torch.cat(parts)[None], np.concatenate(rows), {"measure": "self"})

    def predictions(self) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
        """Of this rank's images in chunks: their numbers, features, probabilities and errors p - y, float64
        [r, K]; the same on the ranks of a TP group."""
        classes = len(self.train.set.class_names)
        size = max(1, _CHUNK_NUMBERS // classes)
        for piece in self.train.mine():
            for start in range(0, len(piece.rows), size):
                part = slice(start, start + size)
                logits = self._logits(piece.values[part]).double()
                p = logits.softmax(1) if self.loss == "softmax" else logits.sigmoid()
                used = self._used[piece.rows[part]]
                rows = piece.rows[part][used]
                keep = torch.from_numpy(used).to(p.device)
                y = self._targets(rows, p.shape[1])
                yield rows, piece.values[part][keep], p[keep], p[keep] - y

    def _targets(self, rows: np.ndarray, classes: int) -> Tensor:
        labels = torch.from_numpy(self.train.labels[rows]).to(self.mesh.device)
        return local_targets(self.loss, labels, classes, Mesh.single()).double()

    def _solve(self, held: _Held, wanted: Tensor, damping: float) -> tuple[Tensor, int, float]:
        """H^-1 of each of `wanted` [m, s, D + 1], by conjugate gradients with the diagonal as preconditioner;
        the steps, and the largest relative residual."""
        diagonal = self._mean(held, wanted, lambda chunk: held.curvature(chunk) @ chunk.inputs.square())
        damped = damping * diagonal.mean((1, 2), keepdim=True)
        diagonal = diagonal + damped
        start = _inner(wanted, wanted)
        x, r = torch.zeros_like(wanted), wanted.clone()
        direction = z = r / diagonal
        weight, steps, residual = _inner(r, z), 0, 1.0
        while residual > _TOLERANCE and steps < _MOST_STEPS:
            product = self._mean(held, wanted, lambda chunk, d=direction: held.times(chunk, d))  # type: ignore[misc]
            product += damped * direction
            step = _ratio(weight, _inner(direction, product))
            x, r = x + step * direction, r - step * product
            z = r / diagonal
            before, weight = weight, _inner(r, z)
            direction = z + _ratio(weight, before) * direction
            steps, residual = steps + 1, float(_ratio(_inner(r, r), start).sqrt().max())
        return x, steps, residual

    def _mean(self, held: _Held, like: Tensor, function: Callable[[_Chunk], Tensor]) -> Tensor:
        total = torch.zeros_like(like)
        for chunk in held.chunks(self._share):
            total += function(chunk)
        return sum_over_world(self.mesh, total) / self._count


class _Chunk(NamedTuple):
    """Some of this rank's images: `inputs` h~ [r, D + 1], `p` and `errors` [m, s, r], all float64."""

    rows: np.ndarray
    inputs: Tensor
    p: Tensor
    errors: Tensor


class _Held:
    """The probabilities and errors of a rank's images, float32 [n, u], for the classes [m, s] of scores."""

    def __init__(self, head: HeadInfluence, classes: Tensor):
        self._loss = head.loss
        columns, at = classes.to(head.mesh.device).unique(return_inverse=True)
        self._at = at  # [m, s]
        rows, p, errors = [np.zeros(0, np.int64)], [], []
        for number, _, probabilities, error in head.predictions():
            rows.append(number)
            p.append(probabilities[:, columns].float())
            errors.append(error[:, columns].float())
        none = torch.zeros(0, len(columns), device=head.mesh.device)
        self._p, self._errors = torch.cat([none, *p]), torch.cat([none, *errors])
        self._place = np.full(len(head.train.bad), -1)
        found = np.concatenate(rows)
        self._place[found] = np.arange(len(found))

    def chunks(self, share: Share) -> Iterator[_Chunk]:
        """Of the rows that this rank works on, with bounded memory."""
        m, s = self._at.shape
        for rows, values in share.chunks(_per_row(share.features.dim, m * s)):
            known = self._place[rows] >= 0
            place = torch.from_numpy(self._place[rows[known]]).to(self._at.device)
            p, errors = (
                held[place][:, self._at.flatten()].double().T.view(m, s, -1)
                for held in (self._p, self._errors)
            )
            kept = values[torch.from_numpy(known).to(values.device)]
            yield _Chunk(rows[known], with_one(kept), p, errors)

    def curvature(self, chunk: _Chunk) -> Tensor:
        """The diagonals of A, [m, s, r]."""
        return chunk.p * (1 - chunk.p)

    def times(self, chunk: _Chunk, x: Tensor) -> Tensor:
        """The sum over the chunk of (A (x) h~ h~^T) x, [m, s, D + 1]."""
        along = x @ chunk.inputs.T
        if self._loss == "sigmoid":
            return (self.curvature(chunk) * along) @ chunk.inputs
        weighted = chunk.p * along
        return (weighted - chunk.p * weighted.sum(1, keepdim=True)) @ chunk.inputs


def with_one(features: Tensor) -> Tensor:
    """h~: [b, D] -> float64 [b, D + 1]."""
    return F.pad(features.double(), (0, 1), value=1.0)


def _per_row(dim: int, rows_of_scores: int) -> int:
    return 2 * dim + 5 * rows_of_scores


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is: of a system that is solved already."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
