"""Parameter groups: which weights decay, and by how much."""

from __future__ import annotations

from typing import Any

from torch import nn

from megavit.parallel.layout import layout_of

# Matrices that are not kernels: big_vision decays '.*/kernel' only.
_NOT_KERNELS = ("embed.position", "prefix")


def parameter_groups(model: nn.Module, body_decay: float, head_decay: float | None) -> list[dict[str, Any]]:
    """AdamW groups named body (matrices), head (the classifier's matrix) and no_decay (norms, biases,
    embeddings). A `head_decay` of None is the body's.

    ViT-22B: 0.03 on the body, 3.0 on the head, on matrices only. Logical shapes decide, since ZeRO-3 flattens
    the real ones.
    """
    groups: dict[str, dict[str, Any]] = {
        "body": {"name": "body", "params": [], "weight_decay": body_decay},
        "head": {
            "name": "head",
            "params": [],
            "weight_decay": body_decay if head_decay is None else head_decay,
        },
        "no_decay": {"name": "no_decay", "params": [], "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if name == "head.weight":
            groups["head"]["params"].append(parameter)
        elif len(layout_of(parameter).shape) > 1 and name not in _NOT_KERNELS:
            groups["body"]["params"].append(parameter)
        else:
            groups["no_decay"]["params"].append(parameter)
    return list(groups.values())
