"""What the GPU's tests share: each runs its very body on a CPU too, so that a mistake in it is found without
a GPU. Nothing here needs DeepSpeed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megavit.model.config import ModelConfig
from megavit.model.vit import MegaVit
from megavit.parallel.layout import layout_of

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# Heads of 64, an odd number of tokens (25 patches), a width that kernels for bfloat16 are made for.
SMALL = ModelConfig(
    name="vit_tiny",
    image_size=40,
    patch_size=8,
    channels=3,
    num_classes=10,
    dim=128,
    depth=2,
    num_heads=2,
    mlp_dim=512,
)
POLICIES = ("none", "selective", "full")


def small_model(device: str, dtype: torch.dtype, recompute: str = "none", **changes: Any) -> MegaVit:
    config = dataclasses.replace(SMALL, **changes)
    return fill_head(MegaVit.from_config(config, seed=3, recompute=recompute).to(device, dtype))  # type: ignore


def fill_head(model: MegaVit) -> MegaVit:
    """With weights in the classifier, which starts at zero and lets no gradient through."""
    assert model.head is not None
    layout = layout_of(model.head.weight)
    values = torch.randn(layout.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    with torch.no_grad():
        model.head.weight.copy_(layout.take(values, model.mesh.tp_rank, model.mesh.tp_size))
    return model


def pictures(count: int, device: str, step: int = 0, config: ModelConfig = SMALL) -> tuple[Tensor, Tensor]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(step)
    shape = (count, config.channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator) * 2 - 1
    labels = torch.randint(0, config.num_classes, (count,), generator=generator)
    return images.to(device), labels.to(device)


def close(a: Tensor, b: Tensor, share: float) -> bool:
    """Whether two tensors differ by at most a share of the second's largest value."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return bool((a - b).abs().max() <= share * b.abs().max())
