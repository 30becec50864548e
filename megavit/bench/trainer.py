"""The trainer's step (`Engine.train_step`: DeepSpeed, ZeRO stages 0 to 3) against the bare model's with
torch's AdamW, on one rank and on tensors that are ready.

Both do the same arithmetic: loss, gradients, clipping by the global norm, AdamW with the same groups. What
the trainer adds is DeepSpeed's partitioning and hooks, and the watch over the norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megavit.bench.report import Row
from megavit.bench.rounds import clock_of, ratio_to, rounds
from megavit.model.config import ModelConfig
from megavit.parallel.init import Initializer, logical_parameters
from megavit.parallel.mesh import Mesh
from megavit.tasks.classify import Inputs
from megavit.tasks.config import ClassifyConfig
from megavit.tasks.task import Task, blank_samples, make_task
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from megavit.train.optim import optimizer_groups

if TYPE_CHECKING:
    from megavit.train.engine import StepResult

BARE = "bare model, torch AdamW"
_LR, _DECAY, _CLIP = 1e-4, 0.03, 1.0


def compare(
    model: ModelConfig,
    batch: int,
    stages: Iterable[int],
    *,
    count: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Iterator[Row]:
    """A row for the bare step and for the trainer's at each ZeRO stage. bfloat16 needs stage 1 or higher; the
    bare model then keeps bfloat16 weights and moments only.

    Starts a process group of one rank.
    """
    mesh = Mesh.from_environment()
    run = RunConfig(model=model, task=ClassifyConfig(loss="sigmoid"), compile=compiled)
    task = make_task(run.task, run.model, run.data)
    inputs = _inputs(task, batch, mesh)
    ways: dict[str, Callable[[], Any]] = {BARE: _bare_step(run, task, inputs, mesh, dtype)}
    for stage in stages:
        ways[f"trainer, ZeRO stage {stage}"] = engine_step(run, batch, stage, dtype, mesh)
    seconds = rounds(ways, count, clock_of(mesh.device.type))
    for name in ways:
        yield {
            "shape": model.name,
            "step": name,
            "images_per_s": batch / statistics.median(seconds[name]),
            **ratio_to(BARE, seconds, name),
        }


def engine_step(
    run: RunConfig, batch: int, stage: int, dtype: torch.dtype, mesh: Mesh, **adam: Any
) -> Callable[[], StepResult]:
    """A step of the trainer's engine at a ZeRO stage on one micro-batch of noise; `adam` are further
    parameters of the optimizer. The engine is never freed."""
    from megavit.train.engine import Engine

    ds_config = _ds_config(batch, stage, dtype)
    ds_config["optimizer"]["params"] |= adam
    resolved = resolve_ds_config(ds_config, 1, mesh.device.type)
    engine = Engine(run, resolved, mesh)
    inputs = _inputs(engine.task, batch, mesh)
    return partial(engine.train_step, [inputs], inputs.weights.sum(), _LR)


def _ds_config(batch: int, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_batch_size": batch,
        "gradient_clipping": _CLIP,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": _LR, "weight_decay": _DECAY}},
        "zero_optimization": {"stage": stage},
    }


def _inputs(task: Task, batch: int, mesh: Mesh) -> Inputs:
    """One micro-batch of noise on the mesh's device."""
    samples = blank_samples(task, batch, mesh.device)
    samples.fields["image"].random_(0, 256)
    samples.fields["label"][:, 0].random_(0, task.model.num_classes)
    found: Inputs = task.inputs(samples, mesh, training=True)
    return found


def _bare_step(
    run: RunConfig, task: Task, inputs: Inputs, mesh: Mesh, dtype: torch.dtype
) -> Callable[[], float]:
    module: Any = task.build(Initializer(run.seed, mesh), "none").to(mesh.device, dtype)
    if run.compile:
        module.trunk.compile_blocks()
    groups = optimizer_groups(task, logical_parameters(module), _DECAY)
    optimizer = torch.optim.AdamW(groups, lr=_LR, fused=True)

    def step() -> float:
        loss = module(inputs).loss / inputs.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step
