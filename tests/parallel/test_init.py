"""Initial weights: independent of the TP size, with the paper's distributions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megavit.model.config import ModelConfig
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.mesh import Mesh

CONFIG = ModelConfig(
    image_size=12,
    patch_size=4,
    num_classes=7,
    dim=24,
    depth=2,
    num_heads=4,
    mlp_dim=36,
    qkv_bias=True,
    norm_bias=True,
    layer_scale=0.1,
    num_registers=3,
)


def mesh(tp_rank: int, tp_size: int) -> Mesh:
    return dataclasses.replace(Mesh.single(), tp_rank=tp_rank, tp_size=tp_size)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_same_seed_gives_the_same_logical_weights_at_any_tp_size(tp_size: int) -> None:
    """Catches a draw that depends on the shard: runs at other TP sizes would start from another model."""
    whole = dict(MegaVit.from_config(CONFIG, seed=3).named_parameters())
    shards = [
        dict(MegaVit.from_config(CONFIG, seed=3, mesh=mesh(rank, tp_size)).named_parameters())
        for rank in range(tp_size)
    ]
    for name, parameter in whole.items():
        for rank, shard in enumerate(shards):
            assert torch.equal(shard[name], layout_of(parameter).take(parameter.detach(), rank, tp_size)), (
                name
            )


def test_seed_and_name_change_the_draw() -> None:
    """Catches two layers with the same weights, and a seed that is not used."""
    model, other = MegaVit.from_config(CONFIG, seed=0), MegaVit.from_config(CONFIG, seed=1)
    first, second = model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.blocks[0].attn.qkv.weight)


def test_fused_parts_keep_their_own_fans() -> None:
    """Catches xavier bounds of the fused [3D, D] shape, which would shrink q, k and v by sqrt(2)."""
    dim = 64
    weight = Initializer(0, Mesh.single()).xavier_uniform("w", Layout((3 * dim, dim), 0, (dim, dim, dim)))
    bound = math.sqrt(6 / (dim + dim))
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_distributions() -> None:
    """Catches a wrong scale of the embedding's and the biases' draws."""
    init = Initializer(0, Mesh.single())
    patch = init.lecun_normal("patch", Layout((256, 192)))
    assert patch.std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert patch.abs().max().item() <= 2 * 192**-0.5 / 0.8796 + 1e-6
    assert init.normal("n", Layout((100, 100)), 0.5).std().item() == pytest.approx(0.5, rel=0.05)


def test_meta_device_allocates_nothing() -> None:
    """Catches an initialiser that draws 22e9 numbers for a model without memory."""
    with torch.device("meta"):
        model = MegaVit.from_preset("vit_22b")
    assert all(parameter.is_meta for parameter in model.parameters())
