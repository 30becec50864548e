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
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig
from megavit.train.ds_config import has_cuda_compiler, resolve_ds_config
from megavit.train.inputs import Inputs
from megavit.train.loss import image_losses, local_targets
from megavit.train.optim import parameter_groups

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
    run = RunConfig(model=model, loss="sigmoid", compile=compiled)
    inputs = _inputs(run, batch, mesh)
    ways: dict[str, Callable[[], Any]] = {BARE: _bare_step(run, inputs, mesh, dtype)}
    for stage in stages:
        ds_config, device = _ds_config(batch, stage, dtype), mesh.device.type
        resolved = resolve_ds_config(ds_config, 1, device, has_compiler=has_cuda_compiler())
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


def _inputs(run: RunConfig, batch: int, mesh: Mesh) -> Inputs:
    """One micro-batch of noise on the mesh's device."""
    side, num_classes = run.model.image_size, run.model.num_classes
    images = torch.rand(batch, 3, side, side, device=mesh.device) * 2 - 1
    labels = torch.randint(0, num_classes, (batch, 1), device=mesh.device)
    targets = local_targets(run.loss, labels, num_classes, mesh)
    return Inputs(images, targets, torch.ones(batch, device=mesh.device))


def _bare_step(run: RunConfig, inputs: Inputs, mesh: Mesh, dtype: torch.dtype) -> Callable[[], float]:
    model = MegaVit.from_config(run.model, seed=run.seed).to(mesh.device, dtype)
    if run.compile:
        model.compile_blocks()
    groups = parameter_groups(model, _DECAY, run.head_weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=_LR, fused=True)

    def step() -> float:
        logits = model(inputs.images.to(dtype))
        losses = image_losses(run.loss, logits, inputs.targets, run.model.num_classes, mesh)
        loss = (losses * inputs.weights).sum() / inputs.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
