"""Linear layers whose weights are sharded over the TP group. They store nothing they do not need for
backward.

Letters: B batch, N tokens, `in`/`out` the logical widths. Neither layer copies its input into the region:
that is the block's choice, because two layers may share one `copy_to_tp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from megavit.parallel.collectives import reduce_from_tp
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.mesh import Mesh

_ONEDNN = torch.backends.mkldnn.is_available()  # here, since torch.compile breaks its graph at the question


@torch.library.custom_op("megavit::onednn_linear", mutates_args=())
def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    """rows W^T plus a bias [out] or an addend [n, out]: [n, in], [out, in] -> [n, out], by oneDNN.

    In float32 on a CPU it is about 1.1 times as fast as the BLAS behind torch.mm, and adds without copying
    first. An operator of ours, because inductor takes oneDNN's for constant weights only.
    """
    if addend is not None:
        return torch.ops.mkldnn._linear_pointwise(rows, addend, weight, None, "add")
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@_onednn.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.megavit.onednn_linear)
def _onednn_flops(rows: Any, weight: Any, *rest: Any, **options: Any) -> int:
    return 2 * rows[0] * rows[1] * weight[0]


# What a linear layer's forward pass runs, for `recompute`.
MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.megavit.onednn_linear.default,
}


def matmul_shape(operator: Any, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """[n, out] of what one of `MATMULS` returns."""
    if operator is torch.ops.megavit.onednn_linear.default:
        return arguments[0].shape[0], arguments[1].shape[0]
    rows, weight = arguments[-2:]  # the weight transposed
    return rows.shape[0], weight.shape[1]


def _has_onednn(rows: Tensor) -> bool:
    return _ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu"


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None) -> Tensor:
    """rows W^T plus a bias [out] or an addend [n, out]: [n, in], [out, in] -> [n, out]."""
    if bias is None and addend is None:
        # Not oneDNN's: selective recompute skips one such matmul, and numbers what follows by operator.
        return torch.mm(rows, weight.t())
    if _has_onednn(rows):
        return _onednn(rows, weight, bias, addend)
    start = bias if addend is None else addend
    assert start is not None
    return torch.addmm(start, rows, weight.t())


def _input_gradient(grad_rows: Tensor, weight: Tensor) -> Tensor:
    """grad W: [n, out], [out, in] -> [n, in]."""
    if _has_onednn(grad_rows):
        return _onednn(grad_rows, weight.t(), None, None)
    return torch.mm(grad_rows, weight)


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
            addend = addend.reshape(-1, weight.shape[0])
        out = _affine(rows, weight, bias, addend)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _input_gradient(grad_rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
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
