"""What the engine's model shows through `Engine.call`, against the model of a single process, and that
looking leaves training as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megavit.model
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import gather_from_tp
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from tests.ranks import run_ranks
from tests.train.test_engine import RUN, WEIGHTS, ds_config, inputs, shards_of

# Six heads, which 1, 2 and 3 ranks can share; seven classes, which two or three cannot without padding.
SIZES = {"dim": 48, "num_heads": 6, "mlp_dim": 96, "depth": 3, "num_classes": 7, "num_registers": 2}
IMAGES, BATCH, LR = 7, 3, 3e-2  # two data-parallel ranks have 3 + 1 and 3 + 0 of them
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}

# ranks, tp_size, ZeRO configuration, fields of the model and of the run
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "stage 3, one rank": (1, 1, ds_config(3), {}, {}),
    "stage 3, tp 3": (3, 3, ds_config(3), {}, {}),
    "stage 3, dp 2 x tp 2": (4, 2, ds_config(3, micro_batch=2), {}, {}),
    "stage 3, dp 2, persistent": (
        2,
        1,
        ds_config(3, zero={"stage3_param_persistence_threshold": 1000}),
        {"pool": "cls", "block": "sequential"},
        {"recompute": "full"},
    ),
    "stage 3, dp 2, frozen": (2, 1, ds_config(3), {}, {"freeze": "trunk.embed,trunk.prefix,trunk.blocks.0"}),
    "stage 2, dp 2 x tp 2": (4, 2, ds_config(2, micro_batch=2), {}, {"recompute": "selective"}),
    "stage 0, dp 2": (2, 1, ds_config(0), {}, {}),
    "stage 3, tp 2, bf16": (2, 2, ds_config(3, **BF16), {}, {}),
}


class Keeper:
    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def attention(self, layer: int, weights: Tensor) -> None:
        self.seen[f"attention {layer}"] = weights

    def tokens(self, layer: int, x: Tensor) -> None:
        self.seen[f"tokens {layer}"] = x

    def pool(self, weights: Tensor) -> None:
        self.seen["pool"] = weights


def features(trunk: Any, images: Tensor) -> dict[str, Tensor]:
    """Everything that the feature API gives."""
    tokens = trunk.forward_features(images)
    found = {"features": tokens, "logits": trunk.forward_head(tokens), "forward": trunk(images)}
    found["pooled"] = trunk.forward_head(tokens, pre_logits=True)
    last, maps = trunk.forward_intermediates(images, [0, -1], norm=True, return_prefix_tokens=True)
    found["last"] = last
    for layer, (patches, prefix) in zip([0, 2], maps, strict=True):
        found |= {f"patches {layer}": patches, f"prefix {layer}": prefix}
    (only,) = trunk.forward_intermediates(images, [1], output_fmt="NLC", intermediates_only=True)
    return found | {"patches 1": only}


class Hooks:
    """Gradients as they pass by."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def tokens(self, layer: int, x: Tensor) -> None:
        x.register_hook(lambda grad: self.grads.update({f"hooked {layer}": grad}))


def observed(trunk: Any, images: Tensor) -> dict[str, Tensor]:
    """Attention, token states, and the gradients of a class score, also with respect to the images."""
    images = images.clone().requires_grad_()
    with trunk.observe(Keeper()) as keeper:
        logits = trunk(images)
    seen = keeper.seen | {"images": images}
    grads = torch.autograd.grad(logits[:, 1].sum(), list(seen.values()))
    found = keeper.seen | {f"gradient of {name}": grad for name, grad in zip(seen, grads, strict=True)}
    whole = {}
    for name, value in found.items():  # all heads, from the ranks that have them
        is_shared = "attention" in name or "pool" in name
        whole[name] = gather_from_tp(trunk.mesh, value.detach(), 1) if is_shared else value.detach()
    return whole


def look(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """All of it, as a caller's function does."""
    with torch.no_grad():
        found = features(module.trunk, images)
    found |= observed(module.trunk, images)
    with module.trunk.observe(Hooks()) as hooks:
        module.trunk(images)[:, 1].sum().backward()
    found |= hooks.grads
    maps = shown_in_the_readme()(module, images, 1)
    return found | {f"map {layer}": weights for layer, weights in enumerate(maps)}


def shown_in_the_readme() -> Callable[[nn.Module, Tensor, int], list[Tensor]]:
    """The function of README's section on the engine's model."""
    readme = (Path(megavit.model.__file__).parent / "README.md").read_text()
    section = readme.partition("## On the engine's model")[2]
    names = {"__name__": "readme"}
    exec(section.split("```")[1].removeprefix("python\n"), names)
    return names["maps"]  # type: ignore[return-value]


def batches(mesh: Mesh) -> list[Tensor]:
    """This rank's share of the images: as many batches on each rank, the last of which may be empty."""
    images = torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mine = images[mesh.dp_rank :: mesh.dp_size]
    calls = math.ceil(IMAGES / mesh.dp_size / BATCH)
    return [mine[BATCH * i :][:BATCH] for i in range(calls)]


def single_process(engine: Any) -> MegaVit:
    """A plain model that has the engine's weights."""
    mesh, mine = engine.mesh, []
    for part in engine.state.owned():
        layout = layout_of(engine.parameters[part.name])
        boxes = layout.boxes(mesh.tp_rank, mesh.tp_size, part.start, part.stop)
        mine.append((part.name, boxes, part.tensors["weight"].clone()))
    plain = MegaVit.from_config(engine.run.model, seed=engine.run.seed).eval()
    logical = plain.state_dict()  # frozen ones are still the initial ones
    for name, boxes, flat in (part for parts in mesh.gather(mine) for part in parts):
        matrix = logical[name].view(len(logical[name]), -1)
        for box in boxes:
            values = flat[box.offset :][: box.rows * box.columns].view(box.rows, box.columns)
            matrix[box.row :, box.column :][: box.rows, : box.columns] = values
    return plain


def differences(engine: Any, tolerance: float) -> list[str]:
    """What the engine's model shows otherwise than a single process, over all of this rank's batches."""
    plain, parts = single_process(engine), batches(engine.mesh)
    root = nn.ModuleDict({"trunk": plain})
    expected = look(root, torch.cat(parts))
    results = [engine.call(look, images.to(engine.dtype)) for images in parts]
    wrong = [] if all(result.keys() == expected.keys() for result in results) else ["names"]
    for name, value in expected.items():
        found = torch.cat([result[name].float() for result in results])
        limit = tolerance * float(value.abs().max())
        if value.abs().max() == 0 or not (found - value).abs().max() <= limit:
            wrong.append(f"{name}: {float((found - value).abs().max())} of {float(value.abs().max())}")
    return wrong


def looking(tp_size: int, run: RunConfig, raw: dict[str, Any]) -> tuple[list[str], bool, bool]:
    """What is shown otherwise than by a single process, before, between and after steps; whether the weights'
    gradients are as before; and whether the steps and weights are, to the bit, those of an
    engine that nobody looked into."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(run, tensor_parallel_size=tp_size)
    tolerance = 5e-2 if "bf16" in raw else 1e-5
    outcomes, wrong, clean = [], [], True
    for is_looked_into in (False, True):
        engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
        steps = []
        for step in range(4):
            steps.append(engine.train_step(inputs(run, mesh, step, engine.micro_batch), WEIGHTS.sum(), LR))
            if is_looked_into and step in (1, 2):
                before = {name: (p.requires_grad, p.grad) for name, p in engine.parameters.items()}
                wrong += differences(engine, tolerance)
                for name, parameter in engine.parameters.items():
                    requires_grad, grad = before[name]
                    clean &= parameter.requires_grad == requires_grad and parameter.grad is grad
        outcomes.append((steps, shards_of(engine)))
    (steps, weights), (same_steps, same_weights) = outcomes
    same = steps == same_steps and all(torch.equal(weights[name], same_weights[name]) for name in weights)
    return wrong, clean, same


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_engines_model_shows_what_a_single_process_does(case: str) -> None:
    """Catches weights that are not gathered (registers belong to no layer), heads or gradients that lack a
    rank's share, ranks that wait for one without images, and gradients or reductions left for the next
    step."""
    ranks, tp_size, raw, fields, changes = CASES[case]
    model = dataclasses.replace(RUN.model, **SIZES | fields)
    run = dataclasses.replace(RUN, model=model, **changes)
    for wrong, clean, same in run_ranks(ranks, looking, tp_size, run, raw):
        assert wrong == [] and clean and same


def results_of_calls(stage: int) -> list[Any]:
    """What functions return that take nothing, or return what holds no tensors."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(1)
    engine = Engine(RUN, resolve_ds_config(ds_config(stage), mesh.dp_size, "cpu"), mesh)
    results: list[Any] = [0.5, None, {0: "cat"}, {1, 2}, range(3), Keeper]
    found = [engine.call(lambda module, result=result: result) for result in results]
    graph = engine.call(lambda module: module.trunk(torch.zeros(1, 1, 8, 8)))
    return [a is b for a, b in zip(found, results, strict=True)] + [not graph.requires_grad]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 3])
def test_functions_return_what_they_like(stage: int) -> None:
    """Catches results that DeepSpeed takes apart, and copies, in its search for tensors."""
    assert run_ranks(1, results_of_calls, stage) == [[True] * 7]


def failed_call() -> bool:
    """Whether weights are trained again after a function that fails."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(1)
    engine = Engine(RUN, resolve_ds_config(ds_config(2), mesh.dp_size, "cpu"), mesh)
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda module: 1 / 0)
    return all(parameter.requires_grad for parameter in engine.parameters.values())


@pytest.mark.dist
def test_a_function_that_fails_leaves_the_weights_trainable() -> None:
    """Catches a run that goes on after an error with nothing to train."""
    assert run_ranks(1, failed_call) == [True]
