"""From tokens to classes: attention pooling (MAP) and the class-sharded classifier.

Letters: B batch, N tokens, D width, H heads, K head_dim, C classes. MAP follows big_vision's MAPHead (arXiv
2106.04560): one learned probe attends to all tokens, then a residual MLP. Its attention is standard: no QK
norm, an output bias.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.model.block import Mlp, Norm, Observe, attention_weights
from megavit.model.config import ModelConfig
from megavit.model.frozen import Frozen
from megavit.parallel.collectives import copy_to_tp, gather_from_tp
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.linear import ColumnParallelLinear, RowParallelLinear, is_autocast_enabled, linear


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: one vector is left of an image here, and rounding it would save nothing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MapHead(nn.Module):
    """Attention pooling: [B, N, D] -> [B, D], the last sum in float32. If sharded, two all-reduces of [B, D]
    forward and one of [B, N, D] backward.

    With `qkv_bias` the key bias exists, as in big_vision, but softmax cancels it: its gradient is rounding
    noise.
    """

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        dim = config.dim
        self.mesh = init.mesh
        self.head_dim = config.head_dim
        self.probe = init.xavier_uniform("probe", Layout((dim,)))
        self.q = ColumnParallelLinear(dim, (dim,), init.scope("q"), bias=config.qkv_bias)
        self.kv = ColumnParallelLinear(dim, (dim, dim), init.scope("kv"), bias=config.qkv_bias)
        self.out = RowParallelLinear(dim, dim, init.scope("out"), bias=True)
        self.norm = Norm(config, init.scope("norm"))
        self.mlp = Mlp(config, init.scope("mlp"))

    def forward(self, x: Tensor, observe: Observe | None = None, frozen: Frozen | None = None) -> Tensor:
        """`observe` is called with the probe's attention weights [B, H/tp, N]; `frozen`: see
        `MegaVit.frozen_statistics`."""
        x, probe = copy_to_tp(self.mesh, x, self.probe)
        q = self.q(probe.expand(x.shape[0], -1)).unflatten(-1, (-1, 1, self.head_dim))  # [B, H/tp, 1, K]
        kv = self.kv(x).unflatten(-1, (2, -1, self.head_dim))  # [B, N, 2, H/tp, K]
        k, v = (t.transpose(1, 2) for t in kv.unbind(2))  # [B, H/tp, N, K]
        if observe is None:
            attended = F.scaled_dot_product_attention(q, k, v)  # [B, H/tp, 1, K]
        else:
            weights = attention_weights(q, k).squeeze(2)  # [B, H/tp, N]
            observe(weights)
            attended = weights.unsqueeze(2).to(v.dtype) @ v
        pooled = self.out(attended.flatten(1))  # [B, D]
        (n,) = copy_to_tp(self.mesh, self.norm(pooled, frozen))
        return wide(pooled) + wide(self.mlp(self.mlp.up(n), frozen=frozen))


class Classifier(nn.Module):
    """[B, D] -> this rank's logits [B, ceil(C/tp)], or all [B, C], in float32 whatever the dtype of the
    weights, which start at zero.

    Classes that do not divide by tp_size are padded at the end; `gather_logits` and the losses leave the
    padding out.
    """

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.mesh = init.mesh
        self.num_classes = config.num_classes
        bias = -math.log(config.num_classes) if config.head_bias == "log_prior" else config.head_bias
        self.weight = init.constant("weight", Layout((config.num_classes, config.dim), 0), 0.0)
        self.bias = init.constant("bias", Layout((config.num_classes,), 0), bias)

    def forward(self, features: Tensor) -> Tensor:
        (features,) = copy_to_tp(self.mesh, features)
        device = features.device.type
        with torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext():
            return linear(wide(features), wide(self.weight), wide(self.bias))

    def gather_logits(self, local: Tensor) -> Tensor:
        """[B, ceil(C/tp)] -> [B, C] in class order on every rank; one all-gather."""
        return gather_from_tp(self.mesh, local)[:, : self.num_classes]
