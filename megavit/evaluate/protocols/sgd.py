"""Linear probe B: many linear heads, trained by SGD in one pass over augmented images.

Momentum 0.9, no weight decay, a cosine to 0, 10 epochs in global batches of 1024, random resized crop and
mirror; weights start from N(0, 0.01), biases at 0 (the paper's and DINOv2's recipe). 13 learning rates, which
are scaled by batch / 256, times every kind of feature that is wanted are so many heads, and each image goes
through the frozen model once for all of them. The best head on a held-out tenth of the training set is kept;
the heads have not seen this tenth, and none is trained again with it.

The crops differ from epoch to epoch, so the features cannot come from the cache: the caller makes them, batch
for batch, in the order of `epoch_batches`, each rank its share of each global batch.

Letters: b rows of this rank's share of a global batch, D width of a layer's features, R learning rates, C
classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.protocols.rows import Share, single_labels
from megavit.evaluate.sets.image_set import digest_of
from megavit.parallel.collectives import sum_over_world
from megavit.parallel.mesh import Mesh

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
EPOCHS, BATCH = 10, 1024
_MOMENTUM, _STD = 0.9, 0.01

Batch = tuple[Mapping[str, Tensor], Tensor]
"""This rank's share of a global batch: values [b, D] by layer, and class ids, int64 [b]; b may be 0. The
ranks of a TP group have the same share."""


class Heads(NamedTuple):
    """The heads of one layer, one for each learning rate: weight [R, C, D] and bias [R, C], float32, the same
    on every rank."""

    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Logits [R, m, C] of values [m, D]: one product for all heads."""
        logits = values.to(self.weight) @ self.weight.flatten(0, 1).T  # [m, R C]
        return logits.view(-1, *self.bias.shape).transpose(0, 1) + self.bias[:, None]


def epoch_batches(rows: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of an epoch's global batches, in an order that depends on the seed and the epoch only.

    What is left over after the last full batch is dropped in this epoch, so that all steps weigh the same; a
    set smaller than one batch is one batch. Rank r of n takes `batch[r::n]`.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return [order[start : start + batch] for start in range(0, max(1, len(order) - batch + 1), batch)]


def train_heads(
    batches: Iterable[Batch],
    mesh: Mesh,
    dims: Mapping[str, int],
    num_classes: int,
    steps: int,
    batch: int = BATCH,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> dict[str, Heads]:
    """All heads, by layer, after one pass over `batches`.

    Args:
        batches: `steps` of them, on every rank as many.
        dims: the width of each layer's features.
        batch: images of a global batch, which scales the learning rates.
        seed: of the weights. All heads of a layer start from the same, whatever the other layers are.

    Collective: one all-reduce of all heads' gradients a step. Holds weights, gradients and momentum: four
    times R C (D + 1) numbers a layer, e.g. 1.3 GB for R 13, C 1000, D 6144.
    """
    heads = {layer: _initial(mesh, layer, dim, num_classes, len(rates), seed) for layer, dim in dims.items()}
    parameters = [tensor for layer in heads.values() for tensor in layer]
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    peaks = torch.tensor(rates, device=mesh.device) * (batch / 256)  # [R]
    done = 0
    for values, labels in batches:
        if done == steps:
            raise ValueError(f"there are more than the {steps} batches that the cosine was made for")
        gradients = _gradients(mesh, heads, values, labels)
        rate = peaks * (0.5 * (1 + math.cos(math.pi * done / steps)))
        for parameter, momentum, gradient in zip(parameters, momenta, gradients, strict=True):
            momentum.mul_(_MOMENTUM).add_(gradient)
            parameter.sub_(momentum * rate.view(-1, *[1] * (parameter.ndim - 1)))
        done += 1
    if done != steps:
        raise ValueError(f"there were {done} batches, but the cosine was made for {steps}")
    return heads


def choose(
    heads: Mapping[str, Heads], train: Mapping[str, Features], held: np.ndarray, rates: Sequence[float]
) -> tuple[str, LinearProbe, dict[str, Any]]:
    """The layer and the head that are right on most of the held-out rows, and what was chosen. Of equal ones
    the one with the smaller mean loss. Collective."""
    best, found = (-math.inf, -math.inf), None
    for layer, own in heads.items():
        accuracy, likelihood = _judge(own, train[layer], held)
        for number, scores in enumerate(zip(accuracy, likelihood, strict=True)):
            if scores > best:
                best, found = scores, (layer, number)
    if found is None:
        raise ValueError("no head has finite weights; lower the learning rates")
    layer, number = found
    features = train[layer]
    classes = torch.from_numpy(np.unique(single_labels(features)[features.usable])).to(features.mesh.device)
    weight, bias = (tensor[number].double() for tensor in heads[layer])
    probe = LinearProbe.over_space(weight[classes], bias[classes], classes, len(weight))
    settings = {
        "rate": rates[number],
        "layer": layer,
        "held_out_images": len(held),
        "held_out_top1": best[0],
    }
    return layer, probe, settings


def _initial(mesh: Mesh, layer: str, dim: int, num_classes: int, count: int, seed: int) -> Heads:
    generator = torch.Generator().manual_seed(int(digest_of(seed, layer)[:15], 16))
    weight = torch.empty(num_classes, dim).normal_(0.0, _STD, generator=generator).to(mesh.device)
    return Heads(weight.expand(count, -1, -1).clone(), torch.zeros(count, num_classes, device=mesh.device))


@torch.no_grad()
def _gradients(
    mesh: Mesh, heads: Mapping[str, Heads], values: Mapping[str, Tensor], labels: Tensor
) -> list[Tensor]:
    """Of the mean cross-entropy over the global batch, in the order of the heads' parameters. Each rank of a
    TP group works on a part of the rows that they share."""
    part = slice(mesh.tp_rank, None, mesh.tp_size)
    targets = labels[part].to(mesh.device)
    sizes = [tensor.numel() for layer in heads.values() for tensor in layer]
    sums = torch.empty(sum(sizes) + 1, device=mesh.device)
    sums[-1] = len(targets)
    pieces = sums[:-1].split(sizes)
    for number, (layer, own) in enumerate(heads.items()):
        x = values[layer][part].to(mesh.device, torch.float32)
        errors = own(x).softmax(-1)  # [R, b, C]
        errors[:, torch.arange(len(targets), device=mesh.device), targets] -= 1
        by_head = errors.transpose(1, 2).flatten(0, 1)  # [R C, b]
        torch.mm(by_head, x, out=pieces[2 * number].view(-1, x.shape[1]))
        torch.sum(by_head, 1, out=pieces[2 * number + 1])
    sums = sum_over_world(mesh, sums)
    mean = (sums[:-1] / sums[-1]).split(sizes)
    tensors = [tensor for layer in heads.values() for tensor in layer]
    return [gradient.view_as(tensor) for gradient, tensor in zip(mean, tensors, strict=True)]


def _judge(heads: Heads, features: Features, held: np.ndarray) -> tuple[list[float], list[float]]:
    """Share of right images and mean log-likelihood of each head; both -inf for a head that has diverged."""
    count, num_classes = heads.bias.shape
    labels = torch.from_numpy(single_labels(features)).to(features.mesh.device)
    found = torch.zeros(2, count, dtype=torch.float64, device=features.mesh.device)
    for rows, values in Share(features, held).chunks(features.dim + 2 * count * num_classes):
        logits, targets = heads(values), labels[rows]  # [R, m, C], [m]
        found[0] += (logits.argmax(-1) == targets).sum(1)
        log_p = logits.log_softmax(-1).gather(-1, targets.expand(count, -1)[..., None])
        found[1] += log_p.double().sum((1, 2))
    found = sum_over_world(features.mesh, found) / len(held)
    found.masked_fill_(~found[1].isfinite(), -math.inf)
    return found[0].tolist(), found[1].tolist()
