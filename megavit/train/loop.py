"""The training run from first to last: read this to know what MegaViT does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from megavit.config import DataConfig, RunConfig
from megavit.data.bad import BAD_SAMPLES_FILE, BadSamples, TooManyBadSamples
from megavit.data.device import to_model_input
from megavit.data.lanes import mix
from megavit.data.loader import EvalLoader, TrainLoader
from megavit.data.manifest import DATA_FILE, Manifest, open_shards
from megavit.data.sources import ShardCache
from megavit.parallel.collectives import sum_over_dp
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import export_weights, save_weights
from megavit.train.ds_config import resolve_ds_config
from megavit.train.engine import Engine
from megavit.train.inputs import check_replicas, collect_bad, share_of, to_inputs, total_weight, whole_batch
from megavit.train.monitor import Monitor, new_run_dir, reference_results
from megavit.train.schedule import lr_at


def train(run: RunConfig, raw_ds_config: dict[str, Any], mesh: Mesh) -> float | None:
    """Train `run` on this rank of `mesh`; returns the final top-1, or None without validation shards.

    Everything that can fail early (shards, batch arithmetic, the run folder) is touched before the model is
    built.
    """
    ds_config = resolve_ds_config(raw_ds_config, mesh.dp_size, mesh.device.type)
    global_batch: int = ds_config["train_batch_size"]
    loader = _train_loader(run, ds_config, mesh)
    eval_loader = _eval_loader(run, ds_config, mesh)
    run_dir = new_run_dir(run, mesh)
    engine = Engine(run, ds_config, mesh)
    monitor = Monitor(run_dir, run, ds_config, mesh)
    if mesh.is_main:
        loader.save_order(run_dir / DATA_FILE, 0)
    bad_samples = BadSamples(
        run.data.max_bad_fraction,
        run.data.max_bad_shards,
        run_dir / BAD_SAMPLES_FILE if mesh.is_main else None,
    )
    peak_lr = ds_config["optimizer"]["params"]["lr"]

    batches = loader.batches(0, run.max_steps)
    top1 = None
    for step in range(run.max_steps):
        started = time.perf_counter()
        # All of a step's micro-batches at once: the loss is divided by the weight of the whole global batch.
        step_batches = [next(batches) for _ in range(engine.grad_accum)]
        data_time_s = time.perf_counter() - started
        if run.data.tp == "replicate" and step % run.data.check_every == 0:
            check_replicas(step_batches, step, mesh)
        weight = total_weight(step_batches, run, mesh)
        micro_batches = (to_inputs(batch, run, mesh) for batch in step_batches)
        if step == 0:
            micro_batches = monitor.show_first(micro_batches)

        _seed_dropout(run.seed, step, mesh)
        lr = lr_at(step, run.max_steps, peak_lr, run.schedule)
        loss, grad_norm = engine.train_step(micro_batches, weight, step, lr)

        # The weight, and so this decision, is the same on every rank.
        bad = collect_bad(step_batches, run, mesh) if int(weight) < global_batch else []
        try:
            bad_samples.add(step + 1, global_batch, bad)
        except TooManyBadSamples:
            save_weights(engine, run_dir, step + 1, loader.state_at(step + 1))
            raise
        monitor.log_step(
            step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            epoch=loader.passes(step + 1),
            bad_samples=bad_samples.total,
            step_time_s=time.perf_counter() - started,
            data_time_s=data_time_s,
        )
        done = step + 1
        if eval_loader and (done == run.max_steps or (run.eval_every and done % run.eval_every == 0)):
            top1, used = evaluate(engine, eval_loader, bad_samples, done)
            monitor.log_eval(done, top1, used, eval_loader.num_samples - used)

    checkpoint = save_weights(engine, run_dir, run.max_steps, loader.state_at(run.max_steps))
    if mesh.is_main:
        out = export_weights(checkpoint, Path(run.export_dir) if run.export_dir else run_dir / "export")
        monitor.say(f"exported the weights to {out} (MegaVit.from_pretrained loads them)")
    if top1 is not None:
        monitor.say(reference_results(run.data.val_shards, top1))
    monitor.close()
    return top1


def evaluate(engine: Engine, loader: EvalLoader, bad_samples: BadSamples, step: int) -> tuple[float, int]:
    """(top-1, samples used) over the whole validation set, exact at any number of ranks: no sample dropped or
    counted twice. A prediction is right if it is one of the image's labels. Bad samples are recorded and left
    out."""
    run, mesh = engine.run, engine.mesh
    counts = torch.zeros(2, device=mesh.device, dtype=torch.float64)  # right, used
    bad = []
    for batch in loader:
        images, labels, weights = whole_batch(batch, run, mesh)
        predicted = engine.predict(to_model_input(images, mesh.device)).argmax(1)
        right = (labels == predicted[:, None]).any(1)
        counts += torch.stack([(right * weights).sum(), weights.sum()])
        bad.append(batch._replace(images=batch.images[:0]))
    right_count, used = sum_over_dp(mesh, counts).tolist()
    if used < loader.num_samples:
        bad_samples.record(step, collect_bad(bad, run, mesh))
    return right_count / max(used, 1), int(used)


def _seed_dropout(seed: int, step: int, mesh: Mesh) -> None:
    """Dropout of a step depends on (seed, step, dp_rank): equal on all TP ranks, and a resumed run repeats
    it."""
    torch.manual_seed(int(mix(seed, step, mesh.dp_rank)) >> 1)  # manual_seed takes 63 bits


def _train_loader(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> TrainLoader:
    return TrainLoader(
        _open(run.data.shards, run.data, mesh),
        run.model,
        run.data,
        seed=run.seed,
        global_batch=ds_config["train_batch_size"],
        micro_batch=ds_config["train_micro_batch_size_per_gpu"],
        share=share_of(run, mesh),
        cache=_cache(run.data),
        allow_unlabelled=run.loss == "sigmoid",
    )


def _eval_loader(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> EvalLoader | None:
    if not run.data.val_shards:
        return None
    return EvalLoader(
        _open(run.data.val_shards, run.data, mesh),
        run.model,
        run.data,
        batch=ds_config["train_micro_batch_size_per_gpu"],
        share=share_of(run, mesh),
        cache=_cache(run.data),
        allow_unlabelled=run.loss == "sigmoid",
    )


def _open(shards: str, config: DataConfig, mesh: Mesh) -> Manifest:
    return mesh.on_main(lambda: open_shards(shards, _cache(config), progress=True))


def _cache(config: DataConfig) -> ShardCache:
    return ShardCache(config.cache_dir, int(config.cache_gb * 1e9), timeout_s=config.timeout_s)
