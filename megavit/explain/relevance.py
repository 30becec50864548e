"""Relevance: gradient x attention, handed back from the pooled feature through every block to the patches.

One update a block: r <- (r + r M) / 2, where M is the positive part of gradient x attention, summed over
heads, each row divided by its sum. In a parallel block attention is all that moves anything between tokens,
so one update says it all; the MLP and the residual are the half that stays. The row that is handed back
starts as the MAP head's own gradient x attention; with mean pooling it is uniform, with a class token that
token's. After Chefer et al.
(arXiv 2103.15679), with rows normalised.

Letters: B images, H heads (/tp a rank's share), N tokens, h rows and w columns of patches.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megavit.explain.gradient import at_baseline, score_gradient
from megavit.explain.target import BLACK, Baseline, Target, check, patch_sums
from megavit.model.block import attention_weights
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import reduce_from_tp


def relevance(model: MegaVit, images: Tensor, target: Target) -> Tensor:
    """Where the model looks for the target, float32 [B, h, w] >= 0, each map of sum 1 at most.

    One forward and backward pass with explicit attention and ordinary gradients. Beside queries and keys it
    holds one layer's attention at a time, if blocks are recomputed; two sums of [B, N] a block over the TP
    group.
    """
    images = check(model, images)
    with model.observe(_Relevance(model, images)) as observer:
        score_gradient(model, images, target)
    return observer.over_patches()


def located(model: MegaVit, images: Tensor, target: Target, *, baseline: Baseline = BLACK) -> Tensor:
    """Where the evidence for the target lies, float32 [B, h, w] >= 0: relevance times the positive part of
    the frozen map, smoothed over 3 x 3 patches. Both come from one forward and backward pass, so this
    relevance has frozen statistics too, which makes no difference to the product.
    """
    images = check(model, images)
    with (
        model.frozen_statistics(halve_attention=True),
        model.observe(_Relevance(model, images)) as observer,
    ):
        gradient = score_gradient(model, images, target).float()
    evidence = patch_sums(model, gradient * (images - at_baseline(images, baseline)).float())
    return observer.over_patches() * smoothed(evidence).clamp(min=0)


def smoothed(values: Tensor) -> Tensor:
    """Means over 3 x 3 patches, as many of them as lie inside: [B, h, w] -> [B, h, w]."""
    return F.avg_pool2d(values[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]


class _Relevance:
    """Observes a forward pass and, by hooks, its backward pass, last block first. `share` [B, N] is how much
    of the feature comes by way of each token at the depth that backward has reached."""

    def __init__(self, model: MegaVit, images: Tensor):
        self._mesh = model.mesh
        self._grid, self._prefix = model.embed.grid(images), model.config.num_prefix_tokens
        self.share = pooling_weights(model, images)
        # Attention is made anew from these in backward: they are small, and the graph has them already unless
        # blocks are recomputed. Keeping the matrices would keep those of all layers.
        self._queries_keys: dict[int, tuple[Tensor, Tensor]] = {}

    def queries_keys(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._queries_keys[layer] = q.detach(), k.detach()

    def attention(self, layer: int, weights: Tensor) -> None:
        weights.register_hook(partial(self._pass_back, layer))

    def pool(self, weights: Tensor) -> None:
        weights.register_hook(partial(self._start, weights.detach()))

    def over_patches(self) -> Tensor:
        return self.share[:, self._prefix :].unflatten(1, self._grid)

    def _start(self, weights: Tensor, grad: Tensor) -> None:
        positive = self._sum((weights * grad).clamp_(min=0).sum(1))  # [B, patches]
        self.share = F.pad(positive / _sums(positive), (self._prefix, 0))

    def _pass_back(self, layer: int, grad: Tensor) -> None:
        weights = attention_weights(*self._queries_keys.pop(layer)).detach()  # [B, H/tp, N, N]
        positive = (weights * grad).clamp_(min=0).sum(1)  # [B, N, N]
        # A row without any evidence passes on nothing.
        rows = self.share / self._sum(positive.sum(-1)).clamp_(min=torch.finfo(grad.dtype).tiny)
        moved = self._sum((rows.unsqueeze(1) @ positive).squeeze(1))
        self.share = (self.share + moved) / 2

    def _sum(self, local: Tensor) -> Tensor:
        return reduce_from_tp(self._mesh, local)


def _sums(rows: Tensor) -> Tensor:
    return rows.sum(-1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny)


def pooling_weights(model: MegaVit, images: Tensor) -> Tensor:
    """What the pooled feature takes of each token, float32 [B, N]: of a mean or a class token. All zero for
    the MAP head, whose weights an observer is told."""
    rows, columns = model.embed.grid(images)
    prefix = model.config.num_prefix_tokens
    weights = torch.zeros(len(images), prefix + rows * columns, device=images.device)
    if model.config.pool == "mean":
        weights[:, prefix:] = 1 / (rows * columns)
    elif model.config.pool == "cls":
        weights[:, model.config.num_registers] = 1
    return weights
