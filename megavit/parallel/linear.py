"""Linear layers whose weights are sharded over the TP group. They store nothing they do not need for
backward.

Letters: B batch, N tokens, `in`/`out` the logical widths. Neither layer copies its input into the region:
that is the block's choice, because two layers may share one `copy_to_tp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megavit.parallel.collectives import reduce_from_tp
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.mesh import Mesh


class _Linear(torch.autograd.Function):
    """x W^T, plus either a bias [out] or an addend [..., out] inside the matmul.

    Saves the parameter itself, not a transposed view of it: under ZeRO-3 a view would keep the gathered
    weight alive until backward. (DeepSpeed patches `torch.nn.functional.linear` process-wide for the same
    reason; this needs no patch.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.has_addend = bias is not None, addend is not None
        rows = x.reshape(-1, x.shape[-1])
        if addend is not None:
            out = torch.addmm(addend.reshape(-1, weight.shape[0]), rows, weight.t())
        elif bias is not None:
            out = torch.addmm(bias, rows, weight.t())
        else:
            out = torch.mm(rows, weight.t())
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.mm(grad_rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = torch.mm(grad_rows.t(), x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = grad_rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, grad if ctx.has_addend else None


class ColumnParallelLinear(nn.Module):
    """[..., in] -> [..., out/tp]: each rank holds rows of the [out, in] weight. No communication.

    `parts` are the output widths of fused projections (q, k, v): each is sharded by itself, so a rank's
    output is its slice of every part, side by side. The input must come through `copy_to_tp`.
    """

    def __init__(
        self,
        in_features: int,
        parts: tuple[int, ...],
        init: Initializer,
        *,
        bias: bool,
        bias_std: float = 0.0,
    ) -> None:
        super().__init__()
        out_features = sum(parts)
        self.weight = init.xavier_uniform("weight", Layout((out_features, in_features), 0, parts))
        self.bias = init.normal("bias", Layout((out_features,), 0, parts), bias_std) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, None)


class RowParallelLinear(nn.Module):
    """[..., in/tp] -> [..., out]: each rank holds columns of the [out, in] weight.

    With `reduce` the ranks' partial sums are all-reduced (out * tokens elements) and the bias, replicated, is
    added once, after it. Without, the partial sum is returned, to be passed as the `addend` of a second
    layer, which then reduces both.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        init: Initializer,
        *,
        bias: bool,
        bias_std: float = 0.0,
        reduce: bool = True,
    ) -> None:
        super().__init__()
        assert reduce or not bias, "a bias added to partial sums would be counted tp_size times"
        self.mesh: Mesh = init.mesh
        self.reduce = reduce
        self.weight = init.xavier_uniform("weight", Layout((out_features, in_features), 1))
        self.bias = init.normal("bias", Layout((out_features,)), bias_std) if bias else None

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        partial = _Linear.apply(x, self.weight, None, addend)
        if not self.reduce:
            return partial
        total = reduce_from_tp(self.mesh, partial)
        return total if self.bias is None else total + self.bias
