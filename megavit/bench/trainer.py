"""The trainer's step (`Engine.train_step`: DeepSpeed, ZeRO stages 0 to 3) against the bare model's with
torch's AdamW, on one rank and on tensors that are ready.

Both do the same arithmetic: loss, gradients, clipping by the global norm, AdamW with the same groups. What
the trainer adds is DeepSpeed's partitioning and hooks, and the watch over the norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

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
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment()
    run = RunConfig(model=model, task=ClassifyConfig(loss="sigmoid"), compile=compiled)
    task = make_task(run.task, run.model, run.data)
    inputs = _inputs(task, batch, mesh)
    ways: dict[str, Callable[[], Any]] = {BARE: _bare_step(run, task, inputs, mesh, dtype)}
    for stage in stages:
        ds_config, device = _ds_config(batch, stage, dtype), mesh.device.type
        resolved = resolve_ds_config(ds_config, 1, device)
        engine = Engine(run, resolved, mesh)
        ways[f"trainer, ZeRO stage {stage}"] = partial(engine.train_step, [inputs], inputs.weights.sum(), _LR)
    seconds = rounds(ways, count, clock_of(mesh.device.type))
    for name in ways:
        yield {
            "shape": model.name,
            "step": name,
            "images_per_s": batch / statistics.median(seconds[name]),
            **ratio_to(BARE, seconds, name),
        }


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
