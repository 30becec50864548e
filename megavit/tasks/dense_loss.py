"""Losses of maps, one number an image, so that their sums do not depend on how images are batched.

Letters: B images, H and W their sides, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(errors: Tensor, valid: Tensor) -> Tensor:
    """float32 [B]: of each image the mean square of `errors` [B, H, W], which are 0 where not `valid` (bool
    [B, H, W]); 0 for an image without a valid pixel."""
    return errors.square().sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def silog_error(errors: Tensor, valid: Tensor, forgiven: float) -> Tensor:
    """float32 [B]: the scale-invariant loss sqrt(mean e^2 - forgiven (mean e)^2) of each image's errors of
    the logarithm (arXiv 1406.2283); arguments as for `squared_error`."""
    count = valid.sum((1, 2)).clamp(min=1)
    mean = errors.sum((1, 2)) / count
    spread = squared_error(errors, valid) - forgiven * mean.square()
    # Without the small number an image without errors, or without valid pixels, would have no gradient.
    return (spread.clamp(min=0) + 1e-8).sqrt() * valid.flatten(1).any(1)


def gradient_error(errors: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """float32 [B]: of each image the mean absolute difference of the errors of neighbouring valid pixels, at
    every 1, 2, 4, ... pixels, summed over `scales` (MegaDepth, arXiv 1804.00607)."""
    total = errors.new_zeros(len(errors))
    for scale in range(scales):
        e, v = errors[:, :: 2**scale, :: 2**scale], valid[:, :: 2**scale, :: 2**scale]
        across = (e[:, :, 1:] - e[:, :, :-1]).abs() * (v[:, :, 1:] & v[:, :, :-1])
        down = (e[:, 1:] - e[:, :-1]).abs() * (v[:, 1:] & v[:, :-1])
        total = total + (across.sum((1, 2)) + down.sum((1, 2))) / v.sum((1, 2)).clamp(min=1)
    return total


def dice_error(logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """float32 [B]: 1 - the soft dice coefficient of softmax `logits` [B, K, H, W] and classes `truth` [B, H,
    W], mean over the classes that occur in the image's `known` pixels (arXiv 1606.04797); 0 if none does."""
    probabilities = logits.softmax(1) * known[:, None]
    targets = torch.zeros_like(probabilities).scatter_(1, torch.where(known, truth, 0)[:, None], 1.0)
    targets = targets * known[:, None]
    both, size = (probabilities * targets).sum((2, 3)), targets.sum((2, 3))
    dice = 2 * both / (probabilities.sum((2, 3)) + size).clamp(min=1e-6)
    occurs = size > 0  # [B, K]
    return ((1 - dice) * occurs).sum(1) / occurs.sum(1).clamp(min=1)
