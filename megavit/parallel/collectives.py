"""Collectives over the TP group with the gradients that tensor parallelism needs (Megatron-LM's f and g,
arXiv 1909.08053).

With `tp_size == 1` each is the identity, so the layers above have no such branch. The ones with gradients
wait for their results; blocks use `linear.column_parallel`, which computes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavit.parallel.mesh import Mesh


def start_sum_over_tp(mesh: Mesh, tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Begins one all-reduce of all `tensors` (of one dtype); what it returns waits for it and gives the sums.

    They lie in a buffer of their own: no gradient that autograd may share with another branch is overwritten.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    work = dist.all_reduce(flat, group=mesh.tp_group, async_op=True)

    def finish() -> tuple[Tensor, ...]:
        work.wait()
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return tuple(piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True))

    return finish


def is_functorch_active() -> bool:
    """Whether a transform of `torch.func` is running (vmap, grad, jvp, ...): it takes torch's own operators
    apart, and of our autograd functions those below."""
    return torch._C._are_functorch_transforms_active()


class _CopyToTp(torch.autograd.Function):
    @staticmethod
    def forward(mesh: Mesh, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mesh = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if is_functorch_active():
            return None, *(_apply_reduce(ctx.mesh, grad) for grad in grads)
        return None, *start_sum_over_tp(ctx.mesh, grads)()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], mesh: Mesh, *tensors: Tensor) -> tuple[Any, Any]:
        return _CopyToTp.apply(mesh, *tensors), in_dims[1:]


class _ReduceFromTp(torch.autograd.Function):
    @staticmethod
    def forward(mesh: Mesh, partial: Tensor) -> Tensor:
        # detach() shares memory and version counter: no copy, and autograd still notices if someone saved
        # `partial`.
        total = partial.contiguous().detach()
        dist.all_reduce(total, group=mesh.tp_group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], mesh: Mesh, partial: Tensor) -> tuple[Any, Any]:
        return _ReduceFromTp.apply(mesh, partial), in_dims[1]


class _GatherFromTp(torch.autograd.Function):
    @staticmethod
    def forward(mesh: Mesh, local: Tensor, dim: int) -> Tensor:
        pieces = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(mesh.tp_size)]
        dist.all_gather(pieces, local.contiguous(), group=mesh.tp_group)
        return torch.cat(pieces, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mesh, _, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad.chunk(ctx.mesh.tp_size, ctx.dim)[ctx.mesh.tp_rank].contiguous(), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], mesh: Mesh, local: Tensor, dim: int) -> tuple[Any, Any]:
        dim = dim + 1 if dim >= 0 else dim
        return _GatherFromTp.apply(mesh, local.movedim(in_dims[1], 0), dim), 0


class _AddOverDp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: Mesh, local: Tensor) -> Tensor:
        ctx.mesh = mesh
        return sum_over_dp(mesh, local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, sum_over_dp(ctx.mesh, grad)


# torch.compile cannot trace a collective inside an autograd.Function: compiled blocks break their graph here.
_apply_copy = torch.compiler.disable(_CopyToTp.apply)
_apply_reduce = torch.compiler.disable(_ReduceFromTp.apply)
_apply_gather = torch.compiler.disable(_GatherFromTp.apply)


def copy_to_tp(mesh: Mesh, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Enter a sharded region: identity forward, one all-reduce of all the tensors' gradients (of one dtype)
    backward.

    Replicated parameters used inside the region (the pooling probe sees local heads only) ride along in that
    all-reduce.
    """
    return tensors if mesh.tp_size == 1 else _apply_copy(mesh, *tensors)


def reduce_from_tp(mesh: Mesh, partial: Tensor) -> Tensor:
    """Leave a sharded region: all-reduce (sum) of `partial` forward, in place; identity backward."""
    return partial if mesh.tp_size == 1 else _apply_reduce(mesh, partial)


def gather_from_tp(mesh: Mesh, local: Tensor, dim: int = -1) -> Tensor:
    """Concatenate the ranks' equal-sized pieces along `dim` forward; take this rank's slice of the gradient
    backward."""
    return local if mesh.tp_size == 1 else _apply_gather(mesh, local, dim)


def add_over_dp(mesh: Mesh, local: Tensor) -> Tensor:
    """Elementwise sum over the data-parallel ranks forward, all of whose losses depend on it: the sum of
    their gradients backward."""
    return local if mesh.dp_size == 1 else _AddOverDp.apply(mesh, local)


@torch.no_grad()
def max_over_tp(mesh: Mesh, local: Tensor) -> Tensor:
    """Elementwise maximum over the TP group; carries no gradient."""
    if mesh.tp_size == 1:
        return local
    result = local.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX, group=mesh.tp_group)
    return result


@torch.no_grad()
def sum_over_dp(mesh: Mesh, local: Tensor) -> Tensor:
    """Elementwise sum over the data-parallel ranks, for metrics; carries no gradient."""
    if mesh.dp_size == 1:
        return local
    result = local.clone()
    dist.all_reduce(result, group=mesh.dp_group)
    return result


@torch.no_grad()
def sum_over_world(mesh: Mesh, local: Tensor) -> Tensor:
    """Elementwise sum over all ranks; carries no gradient."""
    if mesh.world_size == 1:
        return local
    result = local.clone()
    dist.all_reduce(result)
    return result


@torch.no_grad()
def max_over_world(mesh: Mesh, local: Tensor) -> Tensor:
    """Elementwise maximum over all ranks; carries no gradient."""
    if mesh.world_size == 1:
        return local
    result = local.clone()
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return result


@torch.no_grad()
def gather_over_world(mesh: Mesh, local: Tensor) -> Tensor:
    """Every rank's tensor (of one shape), stacked in rank order: [world_size, ...]; carries no gradient."""
    if mesh.world_size == 1:
        return local[None]
    pieces = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(mesh.world_size)]
    dist.all_gather(pieces, local.contiguous())
    return torch.stack(pieces)


@torch.no_grad()
def broadcast_over_world(mesh: Mesh, local: Tensor) -> Tensor:
    """The main rank's tensor, in memory of its own; carries no gradient."""
    result = local.clone()
    if mesh.world_size > 1:
        dist.broadcast(result, src=0)
    return result


@torch.no_grad()
def broadcast_over_tp(mesh: Mesh, local: Tensor) -> Tensor:
    """TP rank 0's tensor, in memory of its own; carries no gradient."""
    result = local.clone()
    if mesh.tp_size > 1:
        dist.broadcast(result, src=mesh.dp_rank * mesh.tp_size, group=mesh.tp_group)
    return result


def dropout(mesh: Mesh, x: Tensor, rate: float, training: bool, *, sharded: bool) -> Tensor:
    """Dropout whose mask does not depend on the TP size.

    All TP ranks hold the default generator in the same state. In a sharded region (last dim split over TP)
    each rank draws the mask of the whole width and keeps its own slice: ranks drop different units, the
    generators stay in step, and recomputation, which restores the generator, repeats the mask. Costs
    `tp_size` times the random numbers.
    """
    if not training or rate == 0.0:
        return x
    shares = mesh.tp_size if sharded else 1
    keep = torch.empty(*x.shape[:-1], x.shape[-1] * shares, device=x.device, dtype=x.dtype).bernoulli_(
        1.0 - rate
    )
    if sharded:
        keep = keep.chunk(shares, -1)[mesh.tp_rank]
    return x * keep / (1.0 - rate)
