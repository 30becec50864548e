"""Maps of attention alone. They show where the model looks whatever the class: not specific to the target,
which they do not even take.

Letters: B images, H heads (/tp a rank's share), N tokens, h rows and w columns of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megavit.explain.relevance import pooling_weights
from megavit.explain.target import check
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import reduce_from_tp


@torch.no_grad()
def raw_attention(model: MegaVit, images: Tensor) -> Tensor:
    """Attention of the pooling, mean over heads, float32 [B, h, w]: the MAP head's weights; without it those
    of the last block, of the class token or, with mean pooling, of the mean patch."""
    images = check(model, images)
    with model.observe(_Pooled(model, images) if model.pool else _Last(model, images)) as observer:
        model(images)
    return observer.over_patches()


@torch.no_grad()
def rollout(model: MegaVit, images: Tensor) -> Tensor:
    """Attention through all blocks, (1 + A) / 2 multiplied with one another (arXiv 2005.00928), and through
    the pooling, float32 [B, h, w]. Sums of [B, N, N] a block over the TP group."""
    images = check(model, images)
    with model.observe(_Rollout(model, images)) as observer:
        model(images)
    return observer.over_patches()


class _Pooled:
    """The pooled feature's `share` [B, N] of each token behind the last block."""

    def __init__(self, model: MegaVit, images: Tensor):
        self._model = model
        self._grid, self._prefix = model.embed.grid(images), model.config.num_prefix_tokens
        self.share = pooling_weights(model, images)

    def pool(self, weights: Tensor) -> None:
        self.share = F.pad(self._mean(weights), (self._prefix, 0))

    def over_patches(self) -> Tensor:
        return self.share[:, self._prefix :].unflatten(1, self._grid)

    def _mean(self, weights: Tensor) -> Tensor:
        """Over all ranks' heads."""
        return reduce_from_tp(self._model.mesh, weights.sum(1)) / self._model.config.num_heads


class _Last(_Pooled):
    """... and through the last block's attention."""

    def attention(self, layer: int, weights: Tensor) -> None:
        if layer == self._model.config.depth - 1:
            self.share = (self.share.unsqueeze(1) @ self._mean(weights)).squeeze(1)


class _Rollout(_Pooled):
    """... and through all blocks."""

    def __init__(self, model: MegaVit, images: Tensor):
        super().__init__(model, images)
        self._product: Tensor | None = None

    def attention(self, layer: int, weights: Tensor) -> None:
        mean = self._mean(weights)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        self._product = step if self._product is None else step @ self._product

    def over_patches(self) -> Tensor:
        assert self._product is not None
        self.share = (self.share.unsqueeze(1) @ self._product).squeeze(1)
        return super().over_patches()
