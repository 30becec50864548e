"""Maps from gradients of the score with respect to the image, times the image's difference from a baseline.

Letters: B images, C channels, H height, W width, h rows and w columns of patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megavit.explain.target import BLACK, Baseline, Target, check, patch_sums
from megavit.model.vit import MegaVit


def frozen(
    model: MegaVit, images: Tensor, target: Target, *, baseline: Baseline = BLACK, steps: int = 1
) -> Tensor:
    """Evidence for (positive) and against the target, float32 [B, h, w], at the price of one forward and
    backward pass: gradient x (image - baseline) with frozen statistics and halved attention
    (`MegaVit.frozen_statistics`).

    With more `steps` the gradient is a mean over images on the way from the baseline, the last of which is
    the image itself: slower, somewhat more faithful. The sum of a map is no more than of the order of the
    score's difference from the baseline's: see `sum_check`.
    """
    with model.frozen_statistics(halve_attention=True):
        return _evidence(model, images, target, baseline, [step / steps for step in range(1, steps + 1)])


def gradient(model: MegaVit, images: Tensor, target: Target, *, baseline: Baseline = BLACK) -> Tensor:
    """Plain gradient x (image - baseline), float32 [B, h, w]: for comparison. The gradient through the norms'
    statistics makes it the least faithful of these maps."""
    return _evidence(model, images, target, baseline, [1.0])


def integrated_gradients(
    model: MegaVit, images: Tensor, target: Target, *, baseline: Baseline = BLACK, steps: int = 32
) -> Tensor:
    """Mean gradient on the straight way from the baseline x (image - baseline), float32 [B, h, w] (arXiv
    1703.01365), by the midpoint rule. Its sum tends to score(image) - score(baseline) as `steps` grow."""
    return _evidence(model, images, target, baseline, [(step + 0.5) / steps for step in range(steps)])


class SumCheck(NamedTuple):
    """Whether a map adds up, [B] each: the `total` of its values against the `difference` that the score of
    the image makes to that of the baseline. What is left over, `residual`, is the map's error as an account
    of the score."""

    total: Tensor
    difference: Tensor

    @property
    def residual(self) -> Tensor:
        return self.difference - self.total


@torch.no_grad()
def sum_check(
    model: MegaVit, images: Tensor, target: Target, values: Tensor, *, baseline: Baseline = BLACK
) -> SumCheck:
    """Of a map [B, h, w] that is to add up: `frozen` (nearly), `integrated_gradients`. Two forward passes."""
    images = check(model, images)
    scores = [target.score(model(each)) for each in (images, at_baseline(images, baseline))]
    return SumCheck(values.sum((1, 2)), scores[0] - scores[1])


def at_baseline(images: Tensor, baseline: Baseline) -> Tensor:
    """The baseline as images like those given."""
    return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)


def score_gradient(model: MegaVit, images: Tensor, target: Target) -> Tensor:
    """The score's gradient with respect to the images, [B, C, H, W], and none of the weights'."""
    with torch.enable_grad(), constant_weights(model):
        images = images.detach().requires_grad_()
        score = target.score(model(images)).sum()
        return torch.autograd.grad(score, images)[0]


def _evidence(
    model: MegaVit, images: Tensor, target: Target, baseline: Baseline, shares: Sequence[float]
) -> Tensor:
    """Mean gradient at baseline + share * (image - baseline), times (image - baseline), over each patch."""
    images = check(model, images)
    start = at_baseline(images, baseline)
    total: Tensor | float = 0.0
    for share in shares:
        at = images if share == 1.0 else start + share * (images - start)
        total = total + score_gradient(model, at, target).float()
    return patch_sums(model, total / len(shares) * (images - start).float())


@contextmanager
def constant_weights(module: nn.Module) -> Iterator[None]:
    """No weight requires a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
