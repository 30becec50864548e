"""Which activations of a block are kept for backward and which are computed again.

Per token and block, in elements (D width, F = 4D): none keeps about 16 D, selective 9 D (block input D, q k v
3 D, attention output D, MLP hidden 4 D), full 1 D. Selective rebuilds only norms and GELU, no matmul; full
repeats the forward pass (+33%). Always torch's non-reentrant checkpoint: the only kind that works under
ZeRO-3's hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megavit.config import Recompute
from megavit.parallel.linear import MATMULS, matmul_shape

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# The parallel block's matmuls in the order of its forward: qkv, attention out, MLP up, MLP down.
_SAVED, _DEAD = (0, 2), (1, 3)


class _SkipDeadMatmuls(TorchDispatchMode):
    """While recomputing, hands out uninitialised results for the two out-projections, which backward never
    reads.

    `_Linear` saves its inputs after its matmul, so checkpoint's early stop alone would come one matmul too
    late.
    """

    def __init__(self, reuse: TorchDispatchMode):
        super().__init__()
        self.reuse = reuse  # hands out the saved results; entered first, so it comes after this mode
        self.seen = 0

    def __enter__(self) -> Any:
        self.reuse.__enter__()
        self.seen = 0
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reuse.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATMULS:
            self.seen += 1
            if self.seen - 1 in _DEAD:
                with _disable_current_modes():  # the modes below have never seen this op
                    return args[0].new_empty(matmul_shape(func, args))
        return func(*args, **(kwargs or {}))


def _selective_contexts(skip_dead: bool) -> tuple[Any, Any]:
    """Contexts for one checkpointed call of a parallel block, and for its recomputation."""
    seen = {False: 0, True: 0}  # matmuls so far, in forward and in recomputation

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in MATMULS:
            seen[ctx.is_recompute] += 1
            only_saved_arrive = ctx.is_recompute and skip_dead
            if only_saved_arrive or seen[ctx.is_recompute] - 1 in _SAVED:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    keep, reuse = create_selective_checkpoint_contexts(policy)
    return keep, _SkipDeadMatmuls(reuse) if skip_dead else reuse


def recompute_with(
    policy: Recompute, function: Callable[..., Any], *args: Any, needs_output: bool = False
) -> Any:
    """`function(*args)`, the body of a block, under the policy; the same outputs and gradients for every
    policy.

    `needs_output` says that backward reads the block's projected output (layer scale does): then selective
    has to repeat the out-projections as well.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return function(*args)
    if policy == "full":
        return checkpoint(function, *args, use_reentrant=False)
    context_fn = functools.partial(_selective_contexts, not needs_output)
    return checkpoint(function, *args, use_reentrant=False, context_fn=context_fn)
