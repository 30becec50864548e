"""Transformer blocks of ViT-22B: RMSNorm, QK-normalised attention and an MLP, side by side (arXiv 2302.05442,
section 2).

Letters: B batch, N tokens, D width, H heads, K head_dim, F MLP width; /tp marks a rank's share. Every class
here works on one rank's shard and, with a single rank, is the plain layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.model.config import ModelConfig, Recompute
from megavit.model.frozen import Frozen, halved
from megavit.model.frozen import gelu as frozen_gelu
from megavit.model.norm import normalize
from megavit.model.observe import require_grad
from megavit.model.recompute import recompute_with
from megavit.parallel.collectives import dropout, reduce_from_tp
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel,
    is_autocast_enabled,
)

# MLP biases start at Normal(0, 1e-6), as in big_vision's vit.py.
MLP_BIAS_STD = 1e-6

# What a block can tell an observer, see `MegaVit.observe`.
OBSERVED = ("queries_keys", "attention", "writes")
Seen = dict[str, tuple[Tensor | None, ...]]


class Norm(nn.Module):
    """RMSNorm [..., D] -> [..., D], or LayerNorm with `norm_centring`; no bias unless `norm_bias` (section
    2)."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.centring, self.eps = config.norm_centring, config.norm_eps
        self.weight = init.constant("weight", Layout((config.dim,)), 1.0)
        self.bias = init.constant("bias", Layout((config.dim,)), 0.0) if config.norm_bias else None

    def forward(self, x: Tensor, frozen: Frozen | None = None) -> Tensor:
        return normalize(x, self.weight, self.bias, centring=self.centring, eps=self.eps, frozen=bool(frozen))


class SelfAttention(nn.Module):
    """Attention of this rank's H/tp heads, queries and keys normalised over head_dim by scales shared by all
    heads. The block calls `qkv`, together with other layers of the same input, and then this module.

    `reduce=False` returns the partial sum of the output projection, without bias, for the parallel block to
    add to.
    """

    def __init__(self, config: ModelConfig, init: Initializer, *, reduce: bool):
        super().__init__()
        dim, fp8 = config.dim, config.matmul == "fp8"
        self.mesh = init.mesh
        self.head_dim = config.head_dim
        self.centring, self.eps = config.norm_centring, config.norm_eps
        self.qkv = ColumnParallelLinear(
            dim, (dim, dim, dim), init.scope("qkv"), bias=config.qkv_bias, fp8=fp8
        )
        self.out = RowParallelLinear(dim, dim, init.scope("out"), bias=reduce, reduce=reduce, fp8=fp8)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_scale = init.constant("q_scale", Layout((self.head_dim,)), 1.0)
            self.k_scale = init.constant("k_scale", Layout((self.head_dim,)), 1.0)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """The QK-norm scales: replicated, but each rank's gradient sees local heads only, so
        `column_parallel` must sum it."""
        return (self.q_scale, self.k_scale) if self.qk_norm else ()

    def forward(
        self,
        qkv: Tensor,
        scales: Sequence[Tensor],
        *,
        addend: Tensor | None = None,
        asked: Collection[str] = (),
        frozen: Frozen | None = None,
    ) -> tuple[Tensor, Seen]:
        """[B, N, 3 D/tp] -> [B, N, D], and what is `asked` for (of `OBSERVED`). `scales` are those of
        `column_parallel`; `addend` [B, N, D] joins the output inside its matmul."""
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))  # [B, N, 3, H/tp, K]
        q, k, v = qkv.unbind(2)  # [B, N, H/tp, K]
        if self.qk_norm:
            q = normalize(q, scales[0], None, centring=self.centring, eps=self.eps, frozen=bool(frozen))
            k = normalize(k, scales[1], None, centring=self.centring, eps=self.eps, frozen=bool(frozen))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H/tp, N, K]
        if frozen and frozen.halve_attention:
            # The weights' gradient is the only way to q and k.
            q, k, v = halved(q), halved(k), halved(v)
        attended, weights = attend(q, k, v, explicit="attention" in asked)
        seen = {"queries_keys": (q, k), "attention": (weights,)}
        out = self.out(attended.transpose(1, 2).flatten(2), addend)
        return out, {name: seen[name] for name in asked if name in seen}


def attend(q: Tensor, k: Tensor, v: Tensor, *, explicit: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(K)) v on [B, H, N, K]: by a fused kernel, or, if `explicit`, through
    `attention_weights`, which are returned."""
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v), None
    weights = attention_weights(q, k)
    return weights.to(v.dtype) @ v, weights


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) of [B, H, M, K] and [B, H, N, K]: [B, H, M, N], float32 at least, from scores
    that are so too, as inside the fused kernels. Requires a gradient if gradients are recorded."""
    device, dtype = q.device.type, torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(device, enabled=False) if is_autocast_enabled(device) else nullcontext():
        scores = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * q.shape[-1] ** -0.5
        return require_grad(scores.softmax(-1))


class Mlp(nn.Module):
    """[B, N, D] -> GELU (tanh form) -> [B, N, D]; both linears with bias. The block calls `up`, together with
    other layers of the same input, and then this module."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.mesh = init.mesh
        self.dropout = config.dropout
        dim, hidden, fp8 = config.dim, config.mlp_dim, config.matmul == "fp8"
        biases: dict[str, Any] = {"bias": True, "bias_std": MLP_BIAS_STD}
        self.up = ColumnParallelLinear(dim, (hidden,), init.scope("up"), **biases, fp8=fp8)
        self.down = RowParallelLinear(hidden, dim, init.scope("down"), **biases, fp8=fp8)

    def forward(self, hidden: Tensor, addend: Tensor | None = None, frozen: Frozen | None = None) -> Tensor:
        """From the output of `up` [B, N, F/tp]. `addend` [B, N, D] joins inside the matmul: another layer's
        partial sum, before the one reduce."""
        hidden = frozen_gelu(hidden) if frozen else F.gelu(hidden, approximate="tanh")
        hidden = dropout(self.mesh, hidden, self.dropout, self.training, sharded=True)
        return self.down(hidden, addend)


class _Residual(nn.Module):
    """x + dropout(scale * y): the end of a branch."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.mesh, self.rate = init.mesh, config.dropout
        initial = config.layer_scale
        self.scale = None if initial is None else init.constant("scale", Layout((config.dim,)), initial)

    @property
    def is_plain_sum(self) -> bool:
        """Whether x may join inside the branch's matmuls: every rank's partial sum would add it."""
        return self.mesh.tp_size == 1 and self.scale is None and not (self.training and self.rate)

    def scaled(self, y: Tensor) -> Tensor:
        return y if self.scale is None else y * self.scale

    def add(self, x: Tensor, scaled: Tensor) -> Tensor:
        return x + dropout(self.mesh, scaled, self.rate, self.training, sharded=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(x, self.scaled(y))


Observe = Callable[..., None]


def _observed(found: Any, observe: Mapping[str, Observe] | None) -> Tensor:
    """Ends a block's forward pass. The observer is called here because what it does must not become part of
    what is recomputed, and not outside of the module because ZeRO-3 replaces a module's outputs by copies."""
    y, seen = found
    for name, tell in (observe or {}).items():
        tell(*seen[name])
    return y


class ParallelBlock(nn.Module):
    """y = x + Attn(n) + MLP(n), n = Norm(x): one norm, one residual add, one output bias.

    Costs one all-reduce of [B, N, D] forward and one backward when tp_size > 1; the sequential block costs
    two and two.
    """

    def __init__(self, config: ModelConfig, init: Initializer, recompute: Recompute):
        super().__init__()
        self.mesh, self.recompute = init.mesh, recompute
        self.norm = Norm(config, init.scope("norm"))
        self.attn = SelfAttention(config, init.scope("attn"), reduce=False)
        self.mlp = Mlp(config, init.scope("mlp"))
        self.residual = _Residual(config, init.scope("residual"))

    def forward(
        self, x: Tensor, observe: Mapping[str, Observe] | None = None, frozen: Frozen | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. `observe` has functions by names of `OBSERVED`, which are told those;
        `frozen`: see `MegaVit.frozen_statistics`."""
        # Layer scale's backward reads what the block adds.
        dead = () if self.residual.scale is not None else (self.attn.out, self.mlp.down)
        found = recompute_with(self.recompute, self._forward, x, tuple(observe or ()), frozen, dead=dead)
        return _observed(found, observe)

    def _forward(self, x: Tensor, asked: tuple[str, ...], frozen: Frozen | None) -> tuple[Tensor, Seen]:
        layers = (self.attn.qkv, self.mlp.up)
        (qkv, hidden), scales = column_parallel(self.mesh, self.norm(x, frozen), layers, *self.attn.scales)
        if "writes" in asked:  # the two terms each by itself, at the price of one more all-reduce
            partial, seen = self.attn(qkv, scales, asked=asked, frozen=frozen)
            terms = reduce_from_tp(self.mesh, partial), self.mlp(hidden, frozen=frozen)
            attention, mlp = map(self.residual.scaled, terms)
            return self.residual.add(x, attention + mlp), seen | {"writes": (attention, mlp)}
        start = x if self.residual.is_plain_sum else None
        partial, seen = self.attn(qkv, scales, addend=start, asked=asked, frozen=frozen)
        y = self.mlp(hidden, partial, frozen)
        return self.residual(x, y) if start is None else y, seen


class SequentialBlock(nn.Module):
    """The pre-norm block of ViT-G and ViT-e: x + Attn(Norm(x)), then x + MLP(Norm(x))."""

    def __init__(self, config: ModelConfig, init: Initializer, recompute: Recompute):
        super().__init__()
        if recompute == "selective":
            raise ValueError("recompute='selective' is made for block='parallel'; use 'full' or 'none'")
        self.mesh, self.recompute = init.mesh, recompute
        self.norm = Norm(config, init.scope("norm"))
        self.attn = SelfAttention(config, init.scope("attn"), reduce=True)
        self.attn_residual = _Residual(config, init.scope("attn_residual"))
        self.mlp_norm = Norm(config, init.scope("mlp_norm"))
        self.mlp = Mlp(config, init.scope("mlp"))
        self.residual = _Residual(config, init.scope("residual"))

    def forward(
        self, x: Tensor, observe: Mapping[str, Observe] | None = None, frozen: Frozen | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]. `observe` has functions by names of `OBSERVED`, which are told those;
        `frozen`: see `MegaVit.frozen_statistics`."""
        dead = () if self.residual.scale is not None else (self.mlp.down,)
        found = recompute_with(self.recompute, self._forward, x, tuple(observe or ()), frozen, dead=dead)
        return _observed(found, observe)

    def _forward(self, x: Tensor, asked: tuple[str, ...], frozen: Frozen | None) -> tuple[Tensor, Seen]:
        (qkv,), scales = column_parallel(self.mesh, self.norm(x, frozen), [self.attn.qkv], *self.attn.scales)
        y, seen = self.attn(qkv, scales, asked=asked, frozen=frozen)
        attention = self.attn_residual.scaled(y)
        x = self.attn_residual.add(x, attention)
        (hidden,), _ = column_parallel(self.mesh, self.mlp_norm(x, frozen), [self.mlp.up])
        mlp = self.residual.scaled(self.mlp(hidden, frozen=frozen))
        told = {"writes": (attention, mlp)} if "writes" in asked else {}
        return self.residual.add(x, mlp), seen | told


Block = ParallelBlock | SequentialBlock


def make_block(config: ModelConfig, init: Initializer, recompute: Recompute) -> Block:
    """The block that `config.block` names, running its forward under the recompute policy."""
    return (ParallelBlock if config.block == "parallel" else SequentialBlock)(config, init, recompute)
