"""Which parameters decay."""

from __future__ import annotations

import torch

from megavit.model.vit import MegaVit
from megavit.train.optim import parameter_groups


def test_matrices_decay_and_the_head_has_its_own() -> None:
    """Catches decay on norms, biases, position embedding or probe, and a head that is decayed like the
    body."""
    with torch.device("meta"):
        model = MegaVit.from_preset("vit_tiny", num_registers=2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: g for g in parameter_groups(model, 0.03, 3.0)}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert {key: group["weight_decay"] for key, group in groups.items()} == {
        "body": 0.03,
        "head": 3.0,
        "no_decay": 0.0,
    }
    assert members["head"] == {"head.weight"}
    assert {"embed.weight", "blocks.0.attn.qkv.weight", "pool.kv.weight"} <= members["body"]
    assert {"embed.position", "prefix", "pool.probe", "head.bias", "blocks.0.attn.q_scale"} <= members[
        "no_decay"
    ]
    assert sum(len(m) for m in members.values()) == len(names)
