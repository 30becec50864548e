"""Closed forms against the papers' figures, real models and torch's counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megavit.model.config import PRESETS, ModelConfig, model_preset
from megavit.model.count import block_matrices, forward_flops, num_params, train_flops, trunk_flops_per_token
from megavit.model.vit import MegaVit

# ViT-G and ViT-e are sequential, with LayerNorm and biases everywhere and no QK norm (arXiv 2106.04560,
# 2209.06794).
SEQUENTIAL = {
    "block": "sequential",
    "qkv_bias": True,
    "norm_bias": True,
    "norm_centring": True,
    "qk_norm": False,
}

SMALL = ModelConfig(image_size=28, patch_size=7, num_classes=11, dim=24, depth=3, num_heads=4, mlp_dim=60)
VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, pool="mean", num_registers=3),
    dataclasses.replace(SMALL, pool="cls", num_registers=2, layer_scale=0.1, channels=1),
    dataclasses.replace(SMALL, num_classes=0, qkv_bias=True, norm_bias=True),
    dataclasses.replace(SMALL, layer_scale=1e-5, **SEQUENTIAL),
]


def test_vit_22b_has_the_papers_21743_million_block_matrices() -> None:
    """Catches a wrong width, depth or MLP in the preset; table 1 counts the blocks' matrices only."""
    assert block_matrices(model_preset("vit_22b")) == 21_743_271_936
    assert num_params(model_preset("vit_22b", pool="mean", num_classes=0)) == 21_750_251_520


def test_vit_e_as_in_its_paper_has_3926_million_parameters() -> None:
    """Catches a miscounted bias or norm: this figure includes everything, with JFT's 29,593-way head."""
    config = model_preset("vit_e14", num_classes=29_593, **SEQUENTIAL)
    with torch.device("meta"):
        model = MegaVit.from_config(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters()) == 3_926_402_969


def test_vit_g_as_in_its_paper_has_1843_million_parameters() -> None:
    """Catches a wrong ViT-G row; its figure is the backbone without pooling and head."""
    assert num_params(model_preset("vit_G14", pool="mean", num_classes=0, **SEQUENTIAL)) == 1_842_772_352


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_counts(name: str) -> None:
    """Catches a preset whose closed form differs from its model."""
    with torch.device("meta"):
        model = MegaVit.from_preset(name)
    assert num_params(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_params_and_flops_are_exact(config: ModelConfig) -> None:
    """Catches a matmul or parameter that the closed forms miss: MFU would be wrong by as much."""
    model = MegaVit.from_config(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, config.channels, config.image_size, config.image_size))
    assert counter.get_total_flops() == 3 * forward_flops(config)


def test_mfu_conventions() -> None:
    """Catches a changed numerator: the paper's 54.9% MFU at 1,150 tokens/s on a 275 TFLOP/s chip must come
    out."""
    config = model_preset("vit_22b")
    assert trunk_flops_per_token(config) * 1150 / 275e12 == pytest.approx(0.54935, abs=1e-5)
    assert train_flops(config) == pytest.approx(33.754e12, rel=1e-4)
