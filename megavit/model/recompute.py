"""Which activations of a block are kept for backward and which are computed again.

Per token and block, in elements (D width, F = 4D): none keeps about 16 D, selective 9 D (block input D, q k v
3 D, attention output D, MLP hidden 4 D), full 1 D. Selective rebuilds only norms and GELU, no matmul; full
repeats the forward pass but for the projections back to D, whose outputs backward does not read (+19%, not
+33%). Always torch's non-reentrant checkpoint: the only kind that works under ZeRO-3's hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megavit.model.config import Recompute
from megavit.parallel.collectives import is_functorch_active
from megavit.parallel.linear import MATMULS, RowParallelLinear

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# The parallel block's first matmuls: qkv and MLP up.
_SAVED = 2


@contextmanager
def _without_outputs(dead: Sequence[RowParallelLinear], reuse: Any) -> Iterator[None]:
    """Recomputation, in which the layers whose outputs backward does not read do nothing."""
    for layer in dead:
        layer.output_is_dead = True
    try:
        with reuse:
            yield
    finally:
        for layer in dead:
            layer.output_is_dead = False


def _contexts(policy: Recompute, dead: Sequence[RowParallelLinear]) -> tuple[Any, Any]:
    """Contexts for one checkpointed call, and for its recomputation."""
    keep, reuse = _selective_contexts() if policy == "selective" else (nullcontext(), nullcontext())
    return keep, _without_outputs(dead, reuse)


def _selective_contexts() -> tuple[Any, Any]:
    seen = {False: 0, True: 0}  # matmuls so far, in forward and in recomputation

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in MATMULS:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] <= _SAVED:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def recompute_with(
    policy: Recompute, function: Callable[..., Any], *args: Any, dead: Sequence[RowParallelLinear] = ()
) -> Any:
    """`function(*args)`, the body of a block, under the policy; the same outputs and gradients for every
    policy.

    `dead` are the block's layers whose outputs nothing keeps for backward: what only leads to them is not
    computed again. Under `torch.func`, which takes no part in checkpointing, everything is kept.
    """
    if policy == "none" or not torch.is_grad_enabled() or is_functorch_active():
        return function(*args)
    contexts: dict[str, Any] = {"context_fn": functools.partial(_contexts, policy, dead)}
    if torch.compiler.is_compiling():
        # The compiler finds by itself what is dead, and takes no contexts but selective ones.
        contexts = {"context_fn": _selective_contexts} if policy == "selective" else {}
    return checkpoint(function, *args, use_reentrant=False, **contexts)
