"""The sharded model against the plain one: outputs, every gradient, dropout, and how much is communicated."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavit.model.config import ModelConfig
from megavit.model.vit import MegaVit
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.tasks.loss import image_losses, local_targets
from tests.ranks import run_ranks

# 7 classes: padded at tp 2 and 4. 6 patches wide, MLP 36: no powers of two that would hide an exchange of
# sizes.
CONFIG = ModelConfig(image_size=12, patch_size=2, num_classes=7, dim=24, depth=2, num_heads=4, mlp_dim=36)
CONFIGS = {
    "default": CONFIG,
    "all options": dataclasses.replace(
        CONFIG, qkv_bias=True, norm_bias=True, layer_scale=0.3, num_registers=2, pool="cls", qk_norm=False
    ),
    "sequential": dataclasses.replace(CONFIG, block="sequential", norm_centring=True, qkv_bias=True),
    "three classes": dataclasses.replace(CONFIG, num_classes=3),  # at tp 4 one rank has padding only
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(3, 3, 12, 12, generator=generator) * 2 - 1, torch.tensor([2, 0, 1])


def gradients(
    config: ModelConfig, mesh: Mesh, loss_kind: Any, recompute: Any = "none"
) -> dict[str, torch.Tensor]:
    """Local loss, logits and gradient shards after one backward pass from non-trivial weights."""
    model = MegaVit.from_config(config, mesh=mesh, seed=1, recompute=recompute)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # the zero head would stop every gradient behind it
        logical = torch.randn(config.num_classes, config.dim, generator=generator)
        model.head.weight.copy_(layout_of(model.head.weight).take(logical, mesh.tp_rank, mesh.tp_size))
    images, labels = batch()
    torch.manual_seed(3)
    local = model(images, local_logits=True)
    targets = local_targets(loss_kind, labels[:, None], config.num_classes, mesh)
    loss = image_losses(loss_kind, local, targets, config.num_classes, mesh).mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"loss": loss.detach(), "logits": model.head.gather_logits(local).detach()}


def compare_with_single(tp_size: int) -> list[str]:
    """Names of all tensors that differ between this rank's shard and the slice of the unsharded model's."""
    mesh = Mesh.from_environment(tp_size)
    wrong = []
    for case, config in CONFIGS.items():
        layouts = {name: layout_of(p) for name, p in MegaVit.from_config(config).named_parameters()}
        for loss_kind in ("sigmoid", "softmax"):
            whole = gradients(config, Mesh.single(), loss_kind)
            mine = gradients(config, mesh, loss_kind)
            for name, expected in whole.items():
                if name in layouts:
                    expected = layouts[name].take(expected, mesh.tp_rank, mesh.tp_size)
                scale = (
                    whole[name].abs().max().clamp(min=1e-3)
                )  # a key bias' gradient is zero but for rounding
                if not (mine[name] - expected).abs().max() < 2e-5 * scale:
                    wrong.append(f"{case}, {loss_kind}: {name}")
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize("tp_size", [2, 4])
def test_every_gradient_equals_the_unsharded_one(tp_size: int) -> None:
    """Catches a missing or doubled reduce: QK scales that see local heads, biases added per rank, padded
    classes."""
    assert run_ranks(tp_size, compare_with_single, tp_size) == [[]] * tp_size


def dropout_results() -> list[Any]:
    mesh = Mesh.from_environment(2)
    config = dataclasses.replace(CONFIG, dropout=0.4, emb_dropout=0.3)
    whole = gradients(config, Mesh.single(), "softmax")
    sharded = [gradients(config, mesh, "softmax", policy) for policy in ("none", "full", "selective")]
    same = all(torch.equal(a[name], b[name]) for a, b in pairwise(sharded) for name in a)
    return [
        float((sharded[0]["logits"] - whole["logits"]).abs().max()),
        same,
        sharded[0]["blocks.0.norm.weight"].tolist(),
    ]


@pytest.mark.dist
def test_dropout_masks_do_not_depend_on_tp_and_survive_recomputation() -> None:
    """Catches ranks that drop different replicated units (they would drift apart) or the same sharded
    ones."""
    first, second = run_ranks(2, dropout_results)
    assert first[0] < 1e-5 and first[1] and second[1]
    assert first[2] == second[2]


def count_collectives() -> dict[str, list[int]]:
    """Elements that a forward and a backward pass of a deep and a shallow model all-reduce."""
    mesh = Mesh.from_environment(2)
    seen: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    found = {}
    for block in ("parallel", "sequential"):
        for depth in (1, 3):
            model = MegaVit.from_config(dataclasses.replace(CONFIG, block=block, depth=depth), mesh=mesh)
            seen.clear()
            out = model(batch()[0])
            forward = sum(seen)
            out.sum().backward()
            found[f"{block} {depth}"] = [forward, sum(seen) - forward]
    dist.all_reduce = original
    return found


@pytest.mark.dist
def test_a_parallel_block_costs_one_all_reduce_each_way() -> None:
    """Catches a second reduce in the block: half of ViT-22B's gain from the parallel form would be gone."""
    tokens = batch()[0].shape[0] * 36 * CONFIG.dim
    scales = 2 * CONFIG.dim // CONFIG.num_heads
    for found in run_ranks(2, count_collectives):
        per_block = {
            kind: [(found[f"{kind} 3"][way] - found[f"{kind} 1"][way]) / 2 for way in (0, 1)]
            for kind in ("parallel", "sequential")
        }
        expected = {"parallel": [tokens, tokens + scales], "sequential": [2 * tokens, 2 * tokens + scales]}
        assert per_block == expected
