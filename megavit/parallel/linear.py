"""Linear layers whose weights are sharded over the TP group. They store nothing they do not need for
backward, and compute while the ranks' sums are on their way (as the parallel linears of arXiv 2302.05442,
section 3.2).

Letters: B batch, N tokens, `in`/`out` the logical widths, n rows (B * N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from megavit.parallel.collectives import (
    copy_to_tp,
    is_functorch_active,
    reduce_from_tp,
    start_sum_over_tp,
)
from megavit.parallel.fp8 import product
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.mesh import Mesh

# What a linear layer's forward pass runs, for `recompute`.
MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm_v2.default,
}
# A row-parallel layer multiplies the second part of its rows while the ranks' sum of the first is on its way.
REDUCE_CHUNKS = 2


def _matmul(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    fp8: bool = False,
) -> Tensor:
    """rows W^T (+ bias [out]) (+ addend [n, out]): [n, in], [out, in] -> [n, out]."""
    if fp8:
        out = product(rows, weight, bias)
        return out if addend is None else addend + out
    if addend is not None:
        out = torch.addmm(addend, rows, weight.t())
        return out if bias is None else out + bias
    return torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def _weight_gradient(grad: Tensor, inputs: Tensor, *, fp8: bool) -> Tensor:
    """grad^T x: [n, out], [n, in] -> [out, in]."""
    return product(grad.t(), inputs.t()) if fp8 else torch.mm(grad.t(), inputs)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    """x W^T + bias [out] + addend [..., out], each of the two if given.

    Saves the parameter itself, not a transposed view of it: under ZeRO-3 a view would keep the gathered
    weight alive until backward. (DeepSpeed patches `torch.nn.functional.linear` process-wide for the same
    reason; this needs no patch.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, fp8: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        out = _matmul(_rows(x), weight, bias, None if addend is None else _rows(addend), fp8=fp8)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_rows = _rows(grad)
        needs_x, needs_weight, needs_bias, needs_addend = ctx.needs_input_grad[:4]
        grad_x = _matmul(grad_rows, weight.t(), fp8=ctx.fp8).view(x.shape) if needs_x else None
        grad_weight = _weight_gradient(grad_rows, _rows(x), fp8=ctx.fp8) if needs_weight else None
        grad_bias = grad_rows.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad if needs_addend else None, None


def is_autocast_enabled(device: str) -> bool:
    """Whether `torch.autocast` is on for this type of device; "meta" has none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype of `torch.autocast`, which does not reach into autograd functions."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None = None,
    *,
    fp8: bool = False,
) -> Tensor:
    """x W^T (+ bias) (+ addend): [..., in], [out, in], [out], [..., out] -> [..., out].

    As `torch.nn.functional.linear`, also under `torch.autocast` (where an addend keeps its dtype),
    `torch.func` and with second derivatives. Keeps x and the weight itself for backward. With `fp8` all three
    products are those of `parallel.fp8`, but for those under `torch.func`.
    """
    x, weight, bias = _autocast(x, weight, bias)
    if is_functorch_active():
        out = x @ weight.t()
        out = out if bias is None else out + bias
        return out if addend is None else addend + out
    if addend is not None and addend.dtype != x.dtype:
        return addend + _Linear.apply(x, weight, bias, None, fp8)
    return _Linear.apply(x, weight, bias, addend, fp8)


class _ReducedLinear(torch.autograd.Function):
    """x W^T + addend, all-reduced over the TP group, plus a bias that joins after it; with `output_is_dead`
    uninitialised memory, at no cost. Saves what `_Linear` saves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        addend: Tensor | None,
        mesh: Mesh,
        output_is_dead: bool,
        fp8: bool,
    ) -> Tensor:
        shape = (*x.shape[:-1], weight.shape[0])
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        if output_is_dead:
            with _disable_current_modes():  # recompute's knows the operators of the forward pass only
                return x.new_empty(shape)
        parts = _rows(x).chunk(REDUCE_CHUNKS)
        starts = [None] * len(parts) if addend is None else _rows(addend).chunk(REDUCE_CHUNKS)
        sums, pending = [], []
        for part, start in zip(parts, starts, strict=True):
            sums.append(_matmul(part, weight, None, start, fp8=fp8))
            pending.append(dist.all_reduce(sums[-1], group=mesh.tp_group, async_op=True))
        for work in pending:
            work.wait()
        total = torch.cat(sums).view(shape)
        return total if bias is None else total.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_Linear.backward(ctx, grad), None, None


class _ColumnLinears(torch.autograd.Function):
    """Enters the sharded region with x and replicated tensors, and multiplies x by several column-parallel
    weights.

    Backward sums the gradients of x and of the replicated tensors over the TP group, in one all-reduce, and
    computes the weights' gradients meanwhile.
    """

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, count: int, fp8: bool, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        """`tensors`: `count` weights, `count` biases or None, the replicated ones."""
        weights, biases, replicated = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.mesh, ctx.count, ctx.fp8 = mesh, count, fp8
        ctx.save_for_backward(x, *weights)
        outs = [
            _matmul(_rows(x), w, b, fp8=fp8).view(*x.shape[:-1], w.shape[0])
            for w, b in zip(weights, biases, strict=True)
        ]
        return *outs, *(t.view_as(t) for t in replicated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        count = ctx.count
        needs_weight, needs_bias = ctx.needs_input_grad[4:][:count], ctx.needs_input_grad[4 + count :][:count]
        grad_rows = [_rows(grad) for grad in grads[:count]]
        grad_x = None
        for rows, weight in zip(grad_rows, weights, strict=True):
            grad_x = _matmul(rows, weight.t(), None, grad_x, fp8=ctx.fp8)
        assert grad_x is not None
        finish = start_sum_over_tp(ctx.mesh, [grad_x.view(x.shape), *grads[count:]])
        inputs = _rows(x)
        grad_weights = [
            _weight_gradient(rows, inputs, fp8=ctx.fp8) if needed else None
            for rows, needed in zip(grad_rows, needs_weight, strict=True)
        ]
        grad_biases = [
            rows.sum(0) if needed else None for rows, needed in zip(grad_rows, needs_bias, strict=True)
        ]
        grad_x, *grad_replicated = finish()
        return None, None, None, grad_x, *grad_weights, *grad_biases, *grad_replicated


# torch.compile cannot trace a collective inside an autograd.Function: compiled blocks break their graph here.
_apply_reduced = torch.compiler.disable(_ReducedLinear.apply)
_apply_columns = torch.compiler.disable(_ColumnLinears.apply)


class ColumnParallelLinear(nn.Module):
    """[..., in] -> [..., out/tp]: each rank holds rows of the [out, in] weight. No communication.

    `parts` are the output widths of fused projections (q, k, v): each is sharded by itself, so a rank's
    output is its slice of every part, side by side. The input must come through `copy_to_tp`; or else the
    layer is called by `column_parallel`.
    """

    def __init__(
        self,
        in_features: int,
        parts: tuple[int, ...],
        init: Initializer,
        *,
        bias: bool,
        bias_std: float = 0.0,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.fp8 = fp8
        out_features = sum(parts)
        self.weight = init.xavier_uniform("weight", Layout((out_features, in_features), 0, parts))
        self.bias = init.normal("bias", Layout((out_features,), 0, parts), bias_std) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias, fp8=self.fp8)


def column_parallel(
    mesh: Mesh, x: Tensor, layers: Sequence[ColumnParallelLinear], *replicated: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Enter a sharded region: the outputs of several layers (all or none in fp8) for one x [..., in], and
    `replicated` as it is to be used inside.

    Backward costs one all-reduce of the gradients of x and of `replicated` (parameters of one dtype of which
    each rank sees a share only, as QK-norm scales see local heads), behind which the weights' gradients are
    computed.
    """
    if mesh.tp_size == 1:
        return tuple(layer(x) for layer in layers), replicated
    if is_functorch_active():
        x, *replicated_inside = copy_to_tp(mesh, x, *replicated)
        return tuple(layer(x) for layer in layers), tuple(replicated_inside)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    x, *weights_and_biases = _autocast(x, *weights, *biases)
    found = _apply_columns(mesh, len(layers), layers[0].fp8, x, *weights_and_biases, *replicated)
    return found[: len(layers)], found[len(layers) :]


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
        fp8: bool = False,
    ) -> None:
        super().__init__()
        assert reduce or not bias, "a bias added to partial sums would be counted tp_size times"
        self.mesh: Mesh = init.mesh
        self.reduce, self.fp8 = reduce, fp8
        # While true the layer returns uninitialised memory, at no cost: for recomputation, when only what the
        # layer keeps for its backward is of interest. (Checkpoint's early stop alone would come one matmul
        # and one reduce too late: a layer keeps its inputs after them.)
        self.output_is_dead = False
        self.weight = init.xavier_uniform("weight", Layout((out_features, in_features), 1))
        self.bias = init.normal("bias", Layout((out_features,)), bias_std) if bias else None

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """`addend` [..., out] joins inside the matmul: a partial sum, or with a single rank anything."""
        reduces = self.reduce and self.mesh.tp_size > 1
        if not reduces and not self.output_is_dead:
            return linear(x, self.weight, self.bias, addend, fp8=self.fp8)
        if is_functorch_active():
            total = reduce_from_tp(self.mesh, linear(x, self.weight, None, addend))
            return total if self.bias is None else total + self.bias
        x, weight, bias = _autocast(x, self.weight, self.bias)
        return _apply_reduced(x, weight, bias, addend, self.mesh, self.output_is_dead, self.fp8)


class Linear(nn.Module):
    """[..., in] -> [..., out], whole on every TP rank: for the small layers that a task adds to the trunk.
    The weight starts Xavier-uniform, the bias at zero. The input is converted to the weight's dtype."""

    def __init__(self, in_features: int, out_features: int, init: Initializer, *, bias: bool = True):
        super().__init__()
        self.weight = init.xavier_uniform("weight", Layout((out_features, in_features)))
        self.bias = init.constant("bias", Layout((out_features,)), 0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias)
