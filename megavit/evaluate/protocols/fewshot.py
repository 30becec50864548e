"""Few-shot classification: ridge regression on a few images of each class (big_vision's `fewshot_lsr`).

The chosen images X are whitened by their own mean and standard deviation and get a constant column of 100, so
that the bias is hardly regularised; the targets Y are +1 for the class and -1 for the others:

    W = (X'X + l2 I)^-1 X'Y = X' (XX' + l2 I)^-1 Y,    l2 = 1024

The smaller of the two matrices is the one that is solved. Since l2 is fixed, a Cholesky factorisation does
it: big_vision's eigenvalues, which serve a sweep over l2, give the same W at 7 times the cost (D = 2048).

Letters: n chosen images, D width of the features, K classes that occur, C classes of the label space.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.protocols.ranking import count_of, require_same_classes, score
from megavit.evaluate.protocols.rows import Share, single_labels
from megavit.evaluate.results import Measurement
from megavit.parallel.collectives import sum_over_world

_CONSTANT = 100.0
_EPSILON = 1e-5  # added to the standard deviation


def fewshot(
    train: Features,
    tests: Sequence[Features],
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = 1024.0,
) -> Iterator[Measurement]:
    """top1 for each number of shots on each test set: the mean over the seeds, with their standard error.

    A class that has fewer images gives all of them; the setting `classes_with_fewer` counts such classes.
    Collective. Each rank keeps its share of the chosen images; per head the ranks exchange a matrix of
    min(n, D + 1) rows and columns and one of D + 1 rows and K columns, in float64.
    """
    for test in tests:
        require_same_classes(train, test)
    labels = single_labels(train)
    chosen = {(count, seed): choose_shots(train, count, seed) for count in shots for seed in seeds}
    share = Share(train, np.unique(np.concatenate(list(chosen.values()))))
    sizes = np.bincount(labels[train.usable])
    sizes = sizes[sizes > 0]
    for count in shots:
        probes = [fit_ridge(share, labels, chosen[count, seed], l2) for seed in seeds]
        settings = {
            "shots": count,
            "seeds": list(seeds),
            "l2": l2,
            "layer": train.layer,
            "images": len(chosen[count, seeds[0]]),
            "classes_with_fewer": int((sizes < count).sum()),
        }
        for test in tests:
            found = count_of(test)
            if not found.used:
                continue
            each = [number / found.used for number in score(test, probes)[0].tolist()]
            yield Measurement(
                "top1",
                statistics.fmean(each),
                found,
                statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
                settings=settings | {"by_seed": each},
                data=test.set.name,
            )


def choose_shots(train: Features, shots: int, seed: int) -> np.ndarray:
    """The numbers of `shots` images of each class, int64 [n]: the first of a permutation of the class's
    usable images, classes in the order of their ids. One shot is also among the five of the same seed."""
    random, labels = np.random.default_rng(seed), single_labels(train)[train.usable]
    by_class = train.usable[np.argsort(labels, kind="stable")]
    ends = np.cumsum(np.unique(labels, return_counts=True)[1])
    return np.concatenate([random.permutation(rows)[:shots] for rows in np.split(by_class, ends[:-1])])


def fit_ridge(share: Share, labels: np.ndarray, rows: np.ndarray, l2: float) -> LinearProbe:
    """The probe learnt from the images `rows`, int64 [n], which must be among the share's. Collective."""
    mesh, dim = share.mesh, share.features.dim
    classes = np.unique(labels[rows])
    place = np.full(len(labels), -1)  # of an image among the chosen ones
    place[rows] = np.arange(len(rows))

    def chosen() -> Iterator[tuple[Tensor, np.ndarray]]:
        for numbers, values in share.chunks(2 * dim + len(classes)):
            own = place[numbers] >= 0
            yield values[torch.from_numpy(own).to(values.device)].double(), numbers[own]

    zeros = torch.zeros(dim, dtype=torch.float64, device=mesh.device)
    mean = sum_over_world(mesh, sum((x.sum(0) for x, _ in chosen()), zeros)) / len(rows)
    squares = sum((((x - mean) ** 2).sum(0) for x, _ in chosen()), zeros)
    std = (sum_over_world(mesh, squares) / len(rows)).sqrt() + _EPSILON
    if not torch.isfinite(std).all():
        raise ValueError(f"{share.features.set.name}: features of {share.features.layer} are not finite")

    def whitened() -> Iterator[tuple[Tensor, np.ndarray]]:
        for x, numbers in chosen():
            yield torch.nn.functional.pad((x - mean) / std, (0, 1), value=_CONSTANT), numbers

    def targets(numbers: np.ndarray) -> Tensor:
        is_class = torch.from_numpy(labels[numbers][:, None] == classes).to(mesh.device)
        return is_class.double() * 2 - 1

    if len(rows) > dim:
        both = zeros.new_zeros(dim + 1, dim + 1 + len(classes))  # X'X and X'Y side by side
        for x, numbers in whitened():
            both += x.T @ torch.cat([x, targets(numbers)], 1)
        gram, products = sum_over_world(mesh, both).split([dim + 1, len(classes)], 1)
        solution = _solve(gram, products, l2)
    else:
        all_x = zeros.new_zeros(len(rows), dim + 1)  # fewer rows than columns: all of them fit
        for x, numbers in whitened():
            all_x[torch.from_numpy(place[numbers]).to(mesh.device)] = x
        all_x = sum_over_world(mesh, all_x)
        solution = all_x.T @ _solve(all_x @ all_x.T, targets(rows), l2)
    weight = (solution[:-1] / std[:, None]).T  # [K, D]: for features that are not whitened
    bias = _CONSTANT * solution[-1] - weight @ mean
    names = share.features.set.class_names
    return LinearProbe.over_space(weight, bias, torch.from_numpy(classes).to(mesh.device), len(names))


def _solve(matrix: Tensor, right: Tensor, l2: float) -> Tensor:
    matrix.diagonal().add_(l2)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
