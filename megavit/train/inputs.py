"""A rank's data: which shards and loaders a run reads from, and the way of a batch to the model (gather over
TP, mirroring on the device)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from megavit.data.bad import BadSample
from megavit.data.cache import ShardCache
from megavit.data.color import change_colors
from megavit.data.config import DataConfig
from megavit.data.device import mirror, to_device
from megavit.data.fields import Batch, Field
from megavit.data.lanes import DataState
from megavit.data.loader import EvalLoader, Share, TrainLoader
from megavit.data.manifest import DATA_FILE, Manifest, open_shards
from megavit.parallel.collectives import gather_from_tp, max_over_tp, sum_over_world
from megavit.parallel.mesh import Mesh
from megavit.tasks.task import DeviceBatch, Task
from megavit.train.config import RunConfig


def share_of(data: DataConfig, mesh: Mesh) -> Share:
    """Which part of every batch this rank decodes."""
    if data.tp == "replicate":
        return Share(mesh.dp_rank, mesh.dp_size, local_size=mesh.local_size)
    return Share(mesh.dp_rank, mesh.dp_size, mesh.tp_rank, mesh.tp_size, mesh.local_size)


def open_data(shards: str, data: DataConfig, mesh: Mesh) -> Manifest:
    """The shards that a pattern or manifest names, read by the main rank. Collective over the world."""
    return mesh.on_main(lambda: open_shards(shards, _cache(data), progress=True, allow_pipe=data.allow_pipe))


def train_loader(
    shards: Manifest,
    task: Task,
    run: RunConfig,
    ds_config: dict[str, Any],
    mesh: Mesh,
    state: DataState | None,
    left_out: Sequence[tuple[int, int]],
) -> TrainLoader:
    """This rank's training data, from a saved state or the start on."""
    return TrainLoader(
        shards,
        task.fields(),
        run.data,
        seed=run.seed,
        global_batch=ds_config["train_batch_size"],
        micro_batch=ds_config["train_micro_batch_size_per_gpu"],
        share=share_of(run.data, mesh),
        cache=_cache(run.data),
        state=state,
        data_file=Path(run.run_dir) / DATA_FILE if run.run_dir else None,
        left_out=left_out,
    )


def eval_loader(
    shards: str, task: Task, data: DataConfig, ds_config: dict[str, Any], mesh: Mesh
) -> EvalLoader:
    """This rank's share of a validation set. Collective over the world."""
    return EvalLoader(
        open_data(shards, data, mesh),
        task.eval_fields(),
        data,
        batch=ds_config["train_micro_batch_size_per_gpu"],
        share=share_of(data, mesh),
        cache=_cache(data),
    )


def _cache(data: DataConfig) -> ShardCache:
    return ShardCache(data.cache_dir, int(data.cache_gb * 1e9), timeout_s=data.timeout_s)


@torch.no_grad()
def to_samples(batch: Batch, fields: Sequence[Field], data: DataConfig, mesh: Mesh) -> DeviceBatch:
    """The whole micro-batch on the device, mirrored and with changed colours. Collective over the TP group.

    Under `tp: split` an all-gather a field over the TP group, 150 kB an image at 224 pixels.
    """
    size, flips = len(batch.flips), batch.flips if batch.flips.any() else None

    def whole(part: Tensor) -> Tensor:
        part = to_device(part, mesh.device)
        return gather_from_tp(mesh, part, 0)[:size] if data.tp == "split" else part

    found = {field.name: whole(batch.fields[field.name]) for field in fields}
    if flips is not None:
        found |= {field.name: mirror(found[field.name], flips) for field in fields if field.is_spatial}
    if batch.colors is not None:
        found |= {
            field.name: change_colors(found[field.name], batch.colors) for field in fields if field.is_color
        }
    blends = None if batch.blends is None else to_device(batch.blends, mesh.device)
    return DeviceBatch(found, whole(batch.weights), blends, batch.numbers)


@torch.no_grad()
def start_counts(batches: list[Batch], stop: bool, task: Task, data: DataConfig, mesh: Mesh) -> Tensor:
    """The number of the task's units in a step's global batch, that of usable samples, and how many ranks
    were asked to stop: float32 [3] on the device, the same on all ranks. Nothing waits for it here. One
    all-reduce over the world."""
    units = torch.stack([task.weight(batch) for batch in batches]).sum()
    usable = torch.stack([batch.weights.sum() for batch in batches]).sum()
    counts = torch.stack([units, usable, torch.tensor(float(stop))])
    if data.tp == "replicate" and mesh.tp_rank:
        counts[:2] = 0
    return sum_over_world(mesh, to_device(counts, mesh.device))


def gather_bad(mine: list[BadSample], data: DataConfig, mesh: Mesh) -> list[BadSample]:
    """The ranks' bad samples of a step or an evaluation, on every rank. Collective over the world."""
    if data.tp == "replicate" and mesh.tp_rank:
        mine = []
    return [bad for found in mesh.gather(mine) for bad in found]


def check_replicas(batches: list[Batch], step: int, mesh: Mesh) -> None:
    """Under `tp: replicate`: ValueError unless all ranks of the TP group decoded the very same batch.

    Their decoders may differ in the last bit where processors or libraries do. One all-reduce of two numbers.
    """
    value = 0
    for batch in batches:
        for field in batch.fields.values():
            value = crc32(field.numpy().data, value)
    extremes = max_over_tp(mesh, torch.tensor([value, -value], dtype=torch.int64, device=mesh.device))
    if int(extremes.sum()):
        raise ValueError(
            f"the ranks of TP group {mesh.dp_rank} decoded different samples for step {step + 1}: their "
            f"processors or image libraries differ; use --data.tp split, which shares one decoded batch"
        )
