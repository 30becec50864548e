"""Linear probe A: multinomial logistic regression on frozen features, by L-BFGS.

scikit-learn's objective, divided by C n, with its meaning of C (the bias is not regularised):

    f(W, b) = 1/n sum_i [logsumexp_c(W_c x_i + b_c) - (W x_i + b)_{y_i}]  +  |W|^2 / (2 C n)

C takes 45 values from 1e-6 to 1e5, as in DINOv2; the best on a held-out tenth of the training set is used for
a fit on all of it. From strong to weak regularisation each fit starts where the one before ended. With two
classes this remains a softmax with two rows, so that C corresponds to 2 C of a single logistic function.

The optimizer does not see W but coordinates in which the curvature at W = 0 is about 1 in each direction: the
features are centred (which only moves b), and column j of W is in units of (var_j / K + 1 / (C n))^-1/2. The
minimum is the same, and it takes fewer steps (on the digits' pixels a quarter fewer).

Letters: n images, m rows of a chunk, D width of the features, K classes that occur, C classes of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.lbfgs import minimize_over_world
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.protocols.ranking import require_same_classes, score, tops
from megavit.evaluate.protocols.rows import Share, held_out_tenth, single_labels
from megavit.evaluate.results import Measurement
from megavit.parallel.collectives import sum_over_world

C_VALUES = tuple(np.logspace(-6, 5, 45).tolist())


class Effort(NamedTuple):
    """When a fit ends: the largest component of the gradient, and the number of steps."""

    gradient_tolerance: float
    max_steps: int


_SWEEP, _FINAL = Effort(1e-5, 100), Effort(1e-7, 1000)


def linear(
    train: Features, tests: Sequence[Features], c_values: Sequence[float] = C_VALUES, seed: int = 0
) -> Iterator[Measurement]:
    """top1 and top5 of the probe on each test set. Collective."""
    for test in tests:
        require_same_classes(train, test)
    probe, settings = fit(train, c_values, seed)
    for test in tests:
        yield from tops(train, test, score(test, [probe])[:, 0], settings)


def fit(
    train: Features, c_values: Sequence[float] = C_VALUES, seed: int = 0
) -> tuple[LinearProbe, dict[str, Any]]:
    """The probe with the best C, and what was chosen: the same on every rank.

    Equal accuracies on the held-out tenth are decided by its log-likelihood. Each fit of the sweep takes 100
    steps at most. Collective. A step is two products of this rank's features with a matrix of K rows, in
    float64, and one all-reduce of K (D + 1) numbers; the whole takes some 1500 to 2000 steps.
    """
    classes = np.unique(single_labels(train)[train.usable])
    fit_rows, held_rows = held_out_tenth(train, seed)
    part, held = Regression(train, classes, fit_rows), Regression(train, classes, held_rows)
    parameters = torch.zeros(len(classes), train.dim + 1, dtype=torch.float64, device=train.mesh.device)
    best, best_c, start = (-1.0, 0.0), 0.0, parameters
    for c in sorted(c_values):
        parameters, _ = part.minimize(c, parameters, _SWEEP)
        found = held.accuracy_and_likelihood(parameters)
        if found > best:
            best, best_c, start = found, c, parameters
    del part, held  # each may keep its rows in memory
    whole = Regression(train, classes, train.usable)
    parameters, converged = whole.minimize(best_c, start, _FINAL)
    settings = {
        "C": best_c,
        "held_out_images": len(held_rows),
        "held_out_top1": best[0],
        "converged": converged,
        "layer": train.layer,
    }
    present = torch.from_numpy(classes).to(train.mesh.device)
    probe = LinearProbe.over_space(parameters[:, :-1], parameters[:, -1], present, len(train.set.class_names))
    return probe, settings


class Regression:
    """The objective over some rows of a training set. Parameters are [W, b], float64 [K, D + 1]. All methods
    are collective.

    Args:
        classes: the ids that have a row in W, int64 [K].
        rows: of the images that the sum is over.
    """

    def __init__(self, train: Features, classes: np.ndarray, rows: np.ndarray):
        self._share, self._mesh, self._count = Share(train, rows), train.mesh, len(rows)
        self._targets = np.searchsorted(classes, single_labels(train))
        self._per_row = 2 * train.dim + 3 * len(classes)
        self._mean = self._average(lambda x: x)
        self._variance = self._average(lambda x: (x - self._mean) ** 2)
        if not torch.isfinite(self._variance).all():
            raise ValueError(f"{train.set.name}: features of {train.layer} are not finite")

    def minimize(self, c: float, start: Tensor, effort: Effort) -> tuple[Tensor, bool]:
        """Parameters at the minimum, searched from `start`, and whether it was reached."""
        num_classes = len(start)
        unit = (self._variance / num_classes + 1 / (c * self._count)).rsqrt()
        units = torch.cat([unit, unit.new_full((1,), num_classes**0.5)])  # [D + 1]

        def centred(parameters: Tensor, sign: float) -> Tensor:
            moved = parameters.clone()
            moved[:, -1] += sign * (parameters[:, :-1] @ self._mean)
            return moved

        def objective(scaled: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self.value_and_gradient(c, centred(scaled * units, -1))
            gradient[:, :-1] -= gradient[:, -1:] * self._mean
            return value, gradient * units

        found = minimize_over_world(self._mesh, objective, centred(start, 1) / units, *effort)
        return centred(found.point * units, -1), found.converged

    def value_and_gradient(self, c: float, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """f, a scalar, and its gradient [K, D + 1]."""
        weight, bias = parameters[:, :-1], parameters[:, -1]
        sums = parameters.new_zeros(parameters.numel() + 1)
        loss, gradient = sums[:1], sums[1:].view_as(parameters)
        for x, targets in self._chunks():
            logits = torch.addmm(bias, x, weight.T)
            total = logits.logsumexp(1, keepdim=True)
            loss += (total - logits.gather(1, targets)).sum()
            errors = logits.sub_(total).exp_()  # probabilities, less 1 for the true class
            errors.scatter_add_(1, targets, errors.new_full(targets.shape, -1.0))
            gradient[:, :-1].addmm_(errors.T, x)
            gradient[:, -1] += errors.sum(0)
        sums = sum_over_world(self._mesh, sums) / self._count
        gradient = sums[1:].view_as(parameters)
        gradient[:, :-1] += weight / (c * self._count)
        return sums[0] + weight.square().sum() / (2 * c * self._count), gradient

    def accuracy_and_likelihood(self, parameters: Tensor) -> tuple[float, float]:
        """The share of images whose class has the highest logit, and the mean log-likelihood."""
        found = parameters.new_zeros(2)
        for x, targets in self._chunks():
            logits = torch.addmm(parameters[:, -1], x, parameters[:, :-1].T)
            found[0] += (logits.argmax(1, keepdim=True) == targets).sum()
            found[1] += logits.log_softmax(1).gather(1, targets).sum()
        accuracy, likelihood = (sum_over_world(self._mesh, found) / self._count).tolist()
        return accuracy, likelihood

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, values in self._share.chunks(self._per_row):
            yield values.double(), torch.from_numpy(self._targets[rows])[:, None].to(values.device)

    def _average(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Over the images, of a function of their features: float64 [D]."""
        total = torch.zeros(self._share.features.dim, dtype=torch.float64, device=self._mesh.device)
        for x, _ in self._chunks():
            total += function(x).sum(0)
        return sum_over_world(self._mesh, total) / self._count
