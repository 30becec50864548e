"""Predicting maps of images of any size with a model of one size: sliding windows, whole images of whole
patches, and mirrored copies.

Letters: B images, C channels, K outputs, H and W the sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]


def sliding_window(predict: Predict, images: Tensor, window: int, stride: int) -> Tensor:
    """`predict`'s maps [B, K, H, W] of images [B, C, H, W], averaged over windows of window x window pixels
    every `stride` pixels, the last ones at the border. `predict` takes [B, C, window, window] to [B, K,
    window, window].

    Images with a side below the window are filled up with zeros (grey), which the result does not have. As
    mmsegmentation's "slide": logits are averaged, before any softmax. ValueError for a stride above the
    window, which would leave gaps.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} must lie in 1 to the window's side, {window}")
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, window - width), 0, max(0, window - height)))
    total: Tensor | None = None
    counts = images.new_zeros(images.shape[2:], dtype=torch.float32)
    for top in _starts(images.shape[2], window, stride):
        for left in _starts(images.shape[3], window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            found = predict(images[:, :, rows, columns]).float()
            if total is None:
                total = found.new_zeros(*found.shape[:2], *images.shape[2:])
            total[:, :, rows, columns] += found
            counts[rows, columns] += 1
    assert total is not None
    return (total / counts)[:, :, :height, :width]


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = side - window
    return [*range(0, last, stride), last]


def filled_up(predict: Predict, images: Tensor, patch: int) -> Tensor:
    """`predict`'s maps [B, K, H, W] of images [B, C, H, W] that are filled up with zeros (grey), at the
    bottom and on the right, to sides that are multiples of the patch."""
    height, width = images.shape[2:]
    return predict(F.pad(images, (0, -width % patch, 0, -height % patch)))[:, :, :height, :width]


def mirrored(predict: Predict) -> Predict:
    """`predict` averaged with its mirrored result of the mirrored images."""

    def both(images: Tensor) -> Tensor:
        return (predict(images) + predict(images.flip(3)).flip(3)) / 2

    return both
