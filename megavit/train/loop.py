"""The training run from first to last: read this to know what MegaViT does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavit.config import RunConfig
from megavit.data.index import index_shards
from megavit.data.lanes import mix
from megavit.data.loader import Batch, EvalLoader, TrainLoader
from megavit.data.transforms import to_model_input
from megavit.parallel.collectives import sum_over_dp
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import export_weights, save_weights
from megavit.train.ds_config import resolve_ds_config
from megavit.train.engine import Engine
from megavit.train.monitor import Monitor, new_run_dir, reference_results
from megavit.train.schedule import lr_at


def train(run: RunConfig, raw_ds_config: dict[str, Any], mesh: Mesh) -> float | None:
    """Train `run` on this rank of `mesh`; returns the final top-1, or None without validation shards.

    Everything that can fail early (shards, batch arithmetic, the run folder) is touched before the model is
    built.
    """
    ds_config = resolve_ds_config(raw_ds_config, mesh.dp_size, mesh.device.type)
    loader = _train_loader(run, ds_config, mesh)
    eval_loader = _eval_loader(run, ds_config, mesh)
    run_dir = new_run_dir(run, mesh)
    engine = Engine(run, ds_config, mesh)
    monitor = Monitor(run_dir, run, ds_config, mesh)
    peak_lr = ds_config["optimizer"]["params"]["lr"]

    batches = loader.batches(0, run.max_steps)
    top1 = None
    for step in range(run.max_steps):
        started = time.perf_counter()
        waits: list[float] = []
        _seed_dropout(run.seed, step, mesh)
        lr = lr_at(step, run.max_steps, peak_lr, run.schedule)
        micro_batches = _to_device(batches, engine.grad_accum, mesh, waits)
        if step == 0:
            micro_batches = monitor.show_first(micro_batches)
        loss, grad_norm = engine.train_step(micro_batches, step, lr)

        monitor.log_step(
            step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            epoch=loader.epoch_at(step + 1),
            step_time_s=time.perf_counter() - started,
            data_time_s=sum(waits),
        )
        done = step + 1
        if eval_loader and (done == run.max_steps or (run.eval_every and done % run.eval_every == 0)):
            top1 = evaluate(engine, eval_loader, mesh)
            monitor.log_eval(done, top1, eval_loader.num_samples)

    checkpoint = save_weights(engine, run_dir, run.max_steps)
    if mesh.is_main:
        out = export_weights(checkpoint, Path(run.export_dir) if run.export_dir else run_dir / "export")
        monitor.say(f"exported the weights to {out} (MegaVit.from_pretrained loads them)")
    if top1 is not None:
        monitor.say(reference_results(run.data.val_shards, top1))
    monitor.close()
    return top1


def evaluate(engine: Engine, loader: EvalLoader, mesh: Mesh) -> float:
    """Top-1 over the whole validation set, exact at any number of ranks: no sample dropped or counted
    twice."""
    counts = torch.zeros(2, dtype=torch.int64, device=mesh.device)  # correct, seen
    for images, labels in loader:
        predicted = engine.predict(to_model_input(images, mesh.device)).argmax(1).cpu()
        counts[0] += (predicted == labels).sum()
        counts[1] += (labels >= 0).sum()
    correct, seen = sum_over_dp(mesh, counts).tolist()
    assert seen == loader.num_samples, (seen, loader.num_samples)
    return correct / seen


def _to_device(
    batches: Iterator[Batch], count: int, mesh: Mesh, waits: list[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The next `count` micro-batches as model input, fetched one at a time; appends the seconds waited for
    each."""
    for _ in range(count):
        started = time.perf_counter()
        images, labels = next(batches)
        waits.append(time.perf_counter() - started)
        yield to_model_input(images, mesh.device), labels.to(mesh.device, non_blocking=True)


def _seed_dropout(seed: int, step: int, mesh: Mesh) -> None:
    """Dropout of a step depends on (seed, step, dp_rank): equal on all TP ranks, and a resumed run repeats
    it."""
    torch.manual_seed(int(mix(seed, step, mesh.dp_rank)) >> 1)  # manual_seed takes 63 bits


def _train_loader(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> TrainLoader:
    return TrainLoader(
        index_shards(run.data.shards, progress=mesh.is_main),
        run.model,
        run.data,
        seed=run.seed,
        global_batch=ds_config["train_batch_size"],
        micro_batch=ds_config["train_micro_batch_size_per_gpu"],
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
    )


def _eval_loader(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> EvalLoader | None:
    if not run.data.val_shards:
        return None
    return EvalLoader(
        index_shards(run.data.val_shards, progress=mesh.is_main),
        run.model,
        run.data,
        batch=ds_config["train_micro_batch_size_per_gpu"],
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
    )
