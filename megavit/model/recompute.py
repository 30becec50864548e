"""Which activations of a block are kept for backward and which are computed again.

Per token and block, in elements (D width, F = 4D): none keeps about 19 D, selective 9 D (block input D, q k v
3 D, MLP hidden 4 D, attention output D), full 1 D. Selective rebuilds only norms and GELU, about 1% of the
FLOPs; full repeats the forward pass (+33%). Always torch's non-reentrant checkpoint: the only kind that works
under ZeRO-3's hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megavit.config import Recompute

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# In the order of the parallel block's forward: qkv, MLP up, then the two out-projections, whose outputs
# backward never reads.
_SAVED_MATMULS = (0, 1)


def _save_in_projections() -> Any:
    """Contexts for one checkpointed call of a parallel block: keep its first two matmuls and the attention
    output."""
    seen: defaultdict[bool, int] = defaultdict(
        int
    )  # matmuls so far, counted apart in forward and in recomputation

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in _MATMULS:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] - 1 in _SAVED_MATMULS:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def recompute_with(policy: Recompute, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, the body of a block, under the policy; the same outputs and gradients for every
    policy."""
    if policy == "none" or not torch.is_grad_enabled():
        return function(*args)
    if policy == "full":
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_save_in_projections)
