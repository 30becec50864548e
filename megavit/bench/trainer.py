"""The trainer's step (`Engine.train_step`: DeepSpeed, ZeRO stages 0 to 3) against the bare model's with
torch's AdamW, on one rank and on tensors that are ready.

Both do the same arithmetic: loss, gradients, clipping by the global norm, AdamW with the same groups. What
the trainer adds is DeepSpeed's partitioning and hooks, and the watch over the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from megavit.bench.model import clock_of
from megavit.bench.peers import Shape
from megavit.bench.rounds import Spread, markdown_table, rounds, speed_ratio, spread
from megavit.model.config import model_config
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
    shape: Shape,
    stages: Iterable[int],
    *,
    count: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> dict[str, tuple[float, Spread]]:
    """Images a second, and the speed in units of the bare step's, of every way. bfloat16 needs stage 1 or
    higher; the bare model then keeps bfloat16 weights and moments only.

    Starts a process group of one rank.
    """
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment()
    run = bench_run(shape, compiled)
    inputs = bench_inputs(run, shape, mesh)
    ways: dict[str, Callable[[], Any]] = {BARE: _bare_step(run, inputs, mesh, dtype)}
    for stage in stages:
        ds_config = _ds_config(shape, stage, dtype)
        resolved = resolve_ds_config(ds_config, 1, mesh.device.type, has_compiler=has_cuda_compiler())
        engine = Engine(run, resolved, mesh)
        ways[f"trainer, ZeRO stage {stage}"] = partial(_trainer_step, engine, inputs)
    seconds = rounds(ways, count, clock_of(mesh.device.type))
    return {
        name: (shape.batch / spread(mine).median, speed_ratio(seconds[BARE], mine))
        for name, mine in seconds.items()
    }


def _trainer_step(engine: Any, inputs: Inputs) -> None:
    engine.train_step([inputs], inputs.weights.sum(), _LR)


def bench_run(shape: Shape, compiled: bool = False) -> RunConfig:
    """The run whose model has `shape`."""
    fields = {
        "name": "bench",
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_classes": shape.num_classes,
        "dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_dim": shape.mlp_dim,
    }
    return RunConfig(model=model_config(fields), loss="sigmoid", compile=compiled)


def _ds_config(shape: Shape, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_batch_size": shape.batch,
        "gradient_clipping": _CLIP,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"lr": _LR, "weight_decay": _DECAY}},
        "zero_optimization": {"stage": stage},
    }


def bench_inputs(run: RunConfig, shape: Shape, mesh: Mesh) -> Inputs:
    """One micro-batch of noise on the mesh's device."""
    side = run.model.image_size
    images = torch.rand(shape.batch, 3, side, side, device=mesh.device) * 2 - 1
    labels = torch.randint(0, shape.num_classes, (shape.batch, 1), device=mesh.device)
    targets = local_targets(run.loss, labels, shape.num_classes, mesh)
    return Inputs(images, targets, torch.ones(shape.batch, device=mesh.device))


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


def to_markdown(results: dict[str, tuple[float, Spread]]) -> str:
    rows = [[name, f"{speed:.2f}", str(ratio)] for name, (speed, ratio) in results.items()]
    return markdown_table(["step", "img/s", "x bare"], rows)


def to_json(results: dict[str, tuple[float, Spread]]) -> list[dict[str, Any]]:
    return [
        {"step": name, "images_per_s": speed, "x_bare": ratio._asdict()}
        for name, (speed, ratio) in results.items()
    ]
