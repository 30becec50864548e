"""Occlusion: how far the score falls when patches are covered. Slow, and the check of the faster maps.

Letters: B images, C channels, H height, W width, h rows and w columns of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import trange

from megavit.explain.target import BLACK, Baseline, Target, check, replace
from megavit.model.vit import MegaVit


@torch.no_grad()
def occlusion(
    model: MegaVit,
    images: Tensor,
    target: Target,
    *,
    baseline: Baseline = BLACK,
    window: int = 1,
    at_once: int = 8,
    progress: bool = False,
) -> Tensor:
    """score(image) - score(image with a window of patches covered), float32 [B, h, w]: each patch has the
    mean over the windows (of `window` x `window` patches, all that lie inside the image) that cover it.

    Costs (h - window + 1) (w - window + 1) + 1 forward passes of B images, `at_once` windows together in one,
    so memory is that of at_once * B images. The number of passes does not depend on B.
    """
    images = check(model, images)
    (rows, columns), count = model.embed.grid(images), len(images)
    covers = _windows(rows, columns, window).to(images.device)  # [windows, h, w]
    whole = target.score(model(images))
    total = torch.zeros(count, rows, columns, device=images.device)
    for start in trange(0, len(covers), at_once, disable=not progress, desc="occlusion"):
        some = covers[start : start + at_once]
        times = len(some)
        patches, repeated = some.repeat_interleave(count, 0), images.repeat(times, 1, 1, 1)
        covered = replace(model, repeated, patches, _repeated(baseline, times))
        scores = target.repeated(times).score(model(covered)).view(times, count)
        total += torch.einsum("sb,shw->bhw", whole - scores, some.to(scores.dtype))
    return total / covers.sum(0)


def _windows(rows: int, columns: int, window: int) -> Tensor:
    """Every place of a window inside the grid, no larger than it: bool [windows, h, w]."""
    height, width = min(window, rows), min(window, columns)
    places = [(r, c) for r in range(rows - height + 1) for c in range(columns - width + 1)]
    covers = torch.zeros(len(places), rows, columns, dtype=torch.bool)
    for cover, (r, c) in zip(covers, places, strict=True):
        cover[r : r + height, c : c + width] = True
    return covers


def _repeated(baseline: Baseline, times: int) -> Baseline:
    """For images `times` over: a baseline of several images is repeated with them."""
    is_per_image = isinstance(baseline, Tensor) and baseline.ndim == 4 and len(baseline) != 1
    return baseline.repeat(times, 1, 1, 1) if is_per_image else baseline  # type: ignore[union-attr]
