"""Which parameters decay, which are frozen, and how fast each layer learns."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from megavit.model.config import model_preset
from megavit.parallel.init import Initializer, logical_parameters
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import ClassifyConfig
from megavit.tasks.task import Task, make_task
from megavit.train.config import RunConfig
from megavit.train.optim import freeze, layer_number, optimizer_groups


def built(**model: Any) -> tuple[Task, nn.Module]:
    """The task of a run with vit_tiny, and its root module, without memory."""
    run = RunConfig(model=model_preset("vit_tiny", **model), task=ClassifyConfig(head_weight_decay=3.0))
    task = make_task(run.task, run.model, run.data)
    with torch.device("meta"):
        return task, task.build(Initializer(0, Mesh.single(), deferred=True), "none")


def members(groups: list[dict[str, Any]], module: nn.Module) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in logical_parameters(module).items()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_matrices_decay_and_the_head_has_its_own() -> None:
    """Catches decay on norms, biases, position embedding or probe, and a head that is decayed like the
    body."""
    task, module = built(num_registers=2)
    parameters = logical_parameters(module)
    groups = optimizer_groups(task, parameters, 0.03)
    found = members(groups, module)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays == {"body": 0.03, "head": 3.0, "no_decay": 0.0}
    assert found["head"] == {"head.weight"}
    assert {"embed.weight", "blocks.0.attn.qkv.weight", "pool.kv.weight"} <= found["body"]
    vectors = {"embed.position", "prefix", "pool.probe", "head.bias", "blocks.0.attn.q_scale"}
    assert vectors <= found["no_decay"]
    assert sum(len(names) for names in found.values()) == len(parameters)


def test_layers_are_numbered_as_in_timm() -> None:
    """Catches a layer-wise decay that is off by a layer from the one that people's recipes were tuned for."""
    timm = pytest.importorskip("timm", reason="timm, a development dependency, is not installed")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("vit_tiny_patch16_224", depth=3, global_pool="map", class_token=False)
    expected: dict[str, float] = {}
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    for group in param_groups_layer_decay(theirs, layer_decay=0.75):
        expected |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    ours = {
        "embed.weight": "patch_embed.proj.weight",
        "embed.position": "pos_embed",
        "blocks.0.attn.qkv.weight": "blocks.0.attn.qkv.weight",
        "blocks.2.mlp.up.bias": "blocks.2.mlp.fc1.bias",
        "norm.weight": "norm.weight",
        "pool.probe": "attn_pool.latent",
        "pool.kv.weight": "attn_pool.kv.weight",
        "head.weight": "head.weight",
    }
    for name, timm_name in ours.items():
        assert 0.75 ** (3 + 1 - layer_number(name, 3)) == pytest.approx(expected[timm_name]), name


def test_each_layer_has_the_rate_of_its_number() -> None:
    """Catches factors that are lost, or a parameter that is in two groups or none."""
    task, module = built()
    groups = optimizer_groups(task, logical_parameters(module), 0.03, layer_decay=0.5)
    found = members(groups, module)
    factors = {name: group["lr_factor"] for group in groups for name in found[group["name"]]}
    depth = task.model.depth
    for name, factor in factors.items():
        block = re.match(r"blocks\.(\d+)", name)
        if block:
            assert factor == 0.5 ** (depth - int(block[1])), name
    assert factors["embed.position"] == 0.5 ** (depth + 1) and factors["head.bias"] == 1.0
    assert factors["norm.weight"] == 0.5 and factors["pool.probe"] == 1.0
    assert len(factors) == len(logical_parameters(module))
    assert sum(len(names) for names in found.values()) == len(factors)


def test_frozen_parameters_are_in_no_group() -> None:
    """Catches frozen weights that have moments, and mistakes in the names that change nothing silently."""
    task, module = built(num_registers=1)
    freeze(module, "trunk.embed, trunk.blocks.0,trunk.prefix")
    names = {
        name
        for group in members(optimizer_groups(task, logical_parameters(module), 0.1), module).values()
        for name in group
    }
    assert "blocks.1.mlp.up.bias" in names and "head.weight" in names
    assert not any(name.startswith(("embed.", "blocks.0.")) or name == "prefix" for name in names)
    with pytest.raises(
        ValueError, match=r"--freeze trunk\.blok: there is no such module; did you mean 'trunk\.bloc"
    ):
        freeze(module, "trunk.blok")
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(module, "trunk")


def test_parameters_that_a_task_makes_otherwise_are_refused() -> None:
    """Catches a layer whose weights would differ between ranks, or overwrite another's in checkpoints."""
    _, module = built()
    module.extra = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"extra\.weight was not made by an Initializer"):
        logical_parameters(module)
    task, module = built()
    with torch.device("meta"):
        module.extra = task.trunk(Initializer(0, Mesh.single(), deferred=True), "none")
    with pytest.raises(ValueError, match=r"two parameters are called embed\.weight, one of them is extra"):
        logical_parameters(module)


def test_dataclass_fields_of_a_task_are_checked() -> None:
    """Catches a task configuration that takes a value which does not fit."""
    with pytest.raises(ValueError, match=r"task\.label_smoothing must lie in \[0, 1\), got 1\.0"):
        dataclasses.replace(ClassifyConfig(), label_smoothing=1.0)
