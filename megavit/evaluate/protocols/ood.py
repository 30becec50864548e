"""Detection of images that are not of the training distribution.

A detector gives every image a score; **higher means more in-distribution**, which is the positive class of
AUROC and AUPR. FPR@95TPR is the share of out-of-distribution images that are taken for in-distribution at the
highest threshold which takes at least 95% of the in-distribution ones.

From the logits: msp (probability of the prediction), max_logit, energy (logsumexp of the logits, i.e. minus
the free energy). From the features, against those of the training set: mahalanobis (minus the squared
distance to the nearest class mean, under one covariance of all classes), relative_mahalanobis (to which the
squared distance under one Gaussian of everything is added), knn (cosine similarity to the k-th nearest
training image).

torchmetrics' `binary_auroc` is not used: it takes scores outside [0, 1] for logits, and after its sigmoid
distances of some hundreds are all equal; nor has it the weights that a bootstrap needs.

Letters: n images, m rows of a piece, D width of the features, C classes of the training set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.knn import nearest
from megavit.evaluate.protocols.rows import Share
from megavit.evaluate.protocols.scores import Link, LogitsOf, score, small_pieces, together
from megavit.evaluate.results import Count, Measurement
from megavit.parallel.collectives import sum_over_dp

Detectors = dict[str, np.ndarray]  # name -> score of every usable image
K = 50
# Share of the mean variance that is added to every variance: in a direction in which the training features do
# not vary, distances are large, but finite.
_RIDGE = 1e-6
_LEAST = 1e-6  # of the variance of all features, that within classes is taken to be at least


def ood(
    inside: Features,
    outside: Features,
    *,
    train: Features | None = None,
    logits_of: LogitsOf | None = None,
    link: Link = "softmax",
    k: int = K,
) -> Iterator[Measurement]:
    """auroc_, aupr_ and fpr95_ of each detector.

    Args:
        inside: features of a test set of the training distribution.
        outside: of a set of another one; its labels are not looked at.
        train: of the training set with its labels, for the distances; None leaves these out.
        logits_of: the classifier, for msp, max_logit and energy, over all its classes; None leaves them out.
            One of the two is needed.
        link: what makes the probabilities of msp.
        k: which neighbour.

    Collective. Cost of the distances: D^2 float64, C x D float64, and the training features once for every
    piece of either set. Cost of the standard errors: 10 s on a core for 100,000 images and six detectors.
    """
    sizes = len(inside.usable), len(outside.usable)
    if not all(sizes):
        raise ValueError(
            f"{inside.set.name} has {sizes[0]} and {outside.set.name} {sizes[1]} readable images; detection "
            "needs both"
        )
    if train is None and logits_of is None:
        raise ValueError(
            f"{inside.set.name}: detection needs a classifier, or training images to be distant from"
        )
    gaussian = None if train is None else fit_gaussian(train)
    pair: list[Detectors] = []
    for features in (inside, outside):
        found = {} if logits_of is None else _of_logits(features, logits_of, link)
        if gaussian is not None and train is not None:
            found |= {**gaussian.detectors(features), "knn": kth_similarity(train, features, k)}
        pair.append(found)
    given, bad = len(inside.bad) + len(outside.bad), int(inside.bad.sum() + outside.bad.sum())
    settings = {
        "inside": inside.set.name,
        "outside": outside.set.name,
        "images_inside": sizes[0],
        "images_outside": sizes[1],
        "positive": "in-distribution",
    }
    more: dict[str, dict[str, object]] = {"msp": {"link": link}}
    if train is not None:
        more["knn"] = {"k": min(k, len(train.usable))}
    for measured in _measure(*pair):
        detector = measured.metric.partition("_")[2]
        yield replace(
            measured, count=Count(given, sum(sizes), bad), settings=settings | more.get(detector, {})
        )


def _of_logits(features: Features, logits_of: LogitsOf, link: Link) -> Detectors:
    scores = score(features, logits_of, link, labelled=False)
    rows = scores.scored
    return {
        "msp": scores.confidence[rows],
        "max_logit": scores.max_logit[rows],
        "energy": scores.logsumexp[rows],
    }


@dataclass(frozen=True)
class Gaussian:
    """Two models of the training features.

    Args:
        whiten: [D, D], L^-1 of the within-class covariance L L^T.
        whiten_all: [D, D], the same of the covariance of everything.
        means: [C, D] of the classes that have images.
        mean: [D] of everything.
    """

    whiten: Tensor
    whiten_all: Tensor
    means: Tensor
    mean: Tensor

    @torch.no_grad()
    def detectors(self, features: Features) -> Detectors:
        """Of every usable image, the same on every rank. Collective."""
        device = features.mesh.device
        out = torch.zeros(2, len(features.bad), dtype=torch.float64, device=device)
        centres = (self.means - self.mean) @ self.whiten.T  # [C, D]
        for rows, values in small_pieces(features.mine(), max(features.dim, len(centres))):
            x = values.double() - self.mean
            within = x @ self.whiten.T
            nearest = torch.cdist(within, centres).square().amin(1)
            place = torch.from_numpy(rows).to(device)
            out[0, place] = -nearest
            out[1, place] = (x @ self.whiten_all.T).square().sum(1) - nearest
        found = together(features.mesh, out)[:, features.usable]
        return {"mahalanobis": found[0], "relative_mahalanobis": found[1]}


@torch.no_grad()
def fit_gaussian(train: Features) -> Gaussian:
    """Class means and covariances of the training features that have one label, by sums over the ranks in
    float64. Two passes: covariances are of centred features, since features may have a large common mean."""
    if train.set.right != "one":
        raise ValueError(f"{train.set.name}: distances to class means need one label an image")
    device, labels = train.mesh.device, train.labels[:, 0]
    classes, place = np.unique(labels, return_inverse=True)
    chosen = (labels >= 0) & ~train.bad
    if not chosen.any():
        raise ValueError(f"{train.set.name} has no labelled image; distances to class means need some")
    sums = torch.zeros(len(classes), train.dim, dtype=torch.float64, device=device)
    for rows, values in small_pieces(train.mine(), train.dim):
        keep = chosen[rows]
        sums.index_add_(
            0,
            torch.from_numpy(place[rows[keep]]).to(device),
            values[torch.from_numpy(keep).to(device)].double(),
        )
    sums = sum_over_dp(train.mesh, sums)
    counts = torch.from_numpy(np.bincount(place[chosen], minlength=len(classes))).to(device)
    mean, means = sums.sum(0) / counts.sum(), sums / counts.clamp(min=1)[:, None]
    scatter = torch.zeros(2, train.dim, train.dim, dtype=torch.float64, device=device)
    for rows, values in small_pieces(train.mine(), train.dim):
        keep = chosen[rows]
        x = values[torch.from_numpy(keep).to(device)].double()
        own = means[torch.from_numpy(place[rows[keep]]).to(device)]
        for total, centre in zip(scatter, (own, mean), strict=True):
            total += (x - centre).T @ (x - centre)
    covariance = sum_over_dp(train.mesh, scatter) / counts.sum()
    spread = covariance[1].diagonal().mean()
    within, everything = (_whitening(part, spread) for part in covariance)
    return Gaussian(within, everything, means[counts > 0], mean)


def _whitening(covariance: Tensor, spread: Tensor) -> Tensor:
    """L^-1 of L L^T = covariance + ridge. `spread` is the mean variance of all features: where no class has
    two images, there is none within classes."""
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    scale = covariance.diagonal().mean().clamp(min=_LEAST * spread + torch.finfo(torch.float64).tiny)
    lower = torch.linalg.cholesky(covariance + _RIDGE * scale * identity)
    return torch.linalg.solve_triangular(lower, identity, upper=False)


@torch.no_grad()
def kth_similarity(train: Features, features: Features, k: int) -> np.ndarray:
    """Cosine similarity of every usable image to its k-th nearest training image, float64, the same on every
    rank; k is at most the number of training images. Collective; see `nearest`."""
    k = min(k, len(train.usable))
    if not k:
        raise ValueError(f"{train.set.name} has no readable image to be a neighbour")
    share, found = Share(train), []
    for _, values in small_pieces(features.everywhere(), k):
        similarities, _ = nearest(share, values, k)
        found.append(similarities[:, -1].cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


class Curve:
    """The operating points of a detector, as functions of how often each image counts.

    Args:
        inside: scores of the in-distribution images, float64 [n].
        outside: scores of the others.
    """

    def __init__(self, inside: np.ndarray, outside: np.ndarray):
        values = np.concatenate([inside, outside])
        self._order = np.argsort(-values, kind="stable")
        self._inside = self._order < len(inside)
        self._last = np.append(np.flatnonzero(np.diff(values[self._order])), len(values) - 1)  # of each tie

    def numbers(self, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """AUROC, AUPR and FPR@95TPR, float64 [3], of images that count `inside` and `outside` times."""
        weights = np.concatenate([inside, outside])[self._order]
        taken = np.cumsum(weights)[self._last]
        hits = np.cumsum(weights * self._inside)[self._last]
        false = taken - hits
        share_hit, share_false = hits / hits[-1], false / false[-1]
        roc = np.trapezoid(np.append(0, share_hit), np.append(0, share_false))
        precision = hits / np.maximum(taken, 1)
        average = np.sum(np.diff(share_hit, prepend=0) * precision)
        return np.array([roc, average, share_false[np.argmax(20 * hits >= 19 * hits[-1])]])


def _measure(inside: Detectors, outside: Detectors) -> Iterator[Measurement]:
    """The three numbers of each detector, still without count and settings. The same images are drawn for all
    detectors' standard errors."""
    curves = [Curve(inside[name], outside[name]) for name in inside]
    sizes = [len(next(iter(side.values()))) for side in (inside, outside)]

    def numbers(*drawn: np.ndarray) -> np.ndarray:
        return np.concatenate([curve.numbers(*drawn) for curve in curves])

    metrics = [f"{metric}_{name}" for name in inside for metric in ("auroc", "aupr", "fpr95")]
    values = numbers(*(np.ones(n, int) for n in sizes))
    errors = standard_error.bootstrap(numbers, *sizes)
    for metric, value, error in zip(metrics, values, errors, strict=True):
        better = not metric.startswith("fpr95")
        yield Measurement(metric, float(value), Count(0, 0, 0), float(error), higher_is_better=better)
