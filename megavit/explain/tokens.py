"""Tokens of high norm, in which some models keep global information: a map that points at them says nothing
of the place (arXiv 2309.16588).

Letters: B images, N tokens, D width, h rows and w columns of patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megavit.explain.target import check
from megavit.model.vit import MegaVit

HIGH = 4.0  # times the median norm of the image's patches
TOP = 0.05  # of the patches
MOST_ON_HIGH = 0.2  # of the top ones; above, a map deserves a warning


class HighNorms(NamedTuple):
    """Of B images. `by_block` [depth + 1, B]: the share of patch tokens whose norm over D is more than `HIGH`
    times the image's median, before the first block and after each. `is_high`, bool [B, h, w]: those after
    the last."""

    by_block: Tensor
    is_high: Tensor

    def share_of_top(self, values: Tensor) -> Tensor:
        """How many of a map's top `TOP` of patches are such tokens, float32 [B]; above `MOST_ON_HIGH` the map
        [B, h, w] may show them rather than the image."""
        count = math.ceil(TOP * values[0].numel()) if len(values) else 0
        top = values.flatten(1).topk(count, 1).indices
        return self.is_high.flatten(1).gather(1, top).float().mean(1)


@torch.no_grad()
def high_norms(model: MegaVit, images: Tensor) -> HighNorms:
    """One forward pass that looks at every block's tokens."""
    images = check(model, images)
    with model.observe(_Norms(model.config.num_prefix_tokens)) as observer:
        model(images)
    shares = [is_high.float().mean(1) for is_high in observer.is_high]
    return HighNorms(torch.stack(shares), observer.is_high[-1].unflatten(1, model.embed.grid(images)))


class _Norms:
    def __init__(self, prefix: int):
        self.is_high: list[Tensor] = []  # [B, patches] of each block
        self._prefix = prefix

    def tokens(self, layer: int, x: Tensor) -> None:
        norms = torch.linalg.vector_norm(x[:, self._prefix :], dim=-1, dtype=torch.float32)
        self.is_high.append(norms > HIGH * norms.median(1, keepdim=True).values)
