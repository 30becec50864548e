"""A rank's data: which shards and loaders a run reads from, and the way of a batch to the model (gather over
TP, augment on the device, dense targets)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from megavit.data.bad import BadSample
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.device import blend, to_model_input
from megavit.data.fields import Batch, Field, Labels, Picture
from megavit.data.lanes import DataState
from megavit.data.loader import EvalLoader, Share, TrainLoader
from megavit.data.manifest import DATA_FILE, Manifest, open_shards
from megavit.parallel.collectives import gather_from_tp, max_over_tp, sum_over_world
from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig
from megavit.train.loss import local_targets


class Inputs(NamedTuple):
    """One micro-batch on the device, the same on all ranks of a TP group but for the targets.

    Letters: b micro-batch, S image side, C channels, K classes, /tp a rank's share.
    """

    images: Tensor  # float32 [b, C, S, S]
    targets: Tensor  # float32 [b, ceil(K/tp)]
    weights: Tensor  # float32 [b]


def classification_fields(run: RunConfig) -> list[Field]:
    """What a sample of a classification run holds: `image` and `label`."""
    model, data = run.model, run.data
    image = Picture(
        size=model.image_size,
        channels=model.channels,
        antialias=data.antialias,
        decoder=data.decoder,
        max_pixels=data.max_pixels,
    )
    none = run.loss == "sigmoid"
    return [image, Labels(num_classes=model.num_classes, max_labels=data.max_labels, allow_none=none)]


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
    run: RunConfig,
    ds_config: dict[str, Any],
    mesh: Mesh,
    state: DataState | None,
    left_out: Sequence[tuple[int, int]],
) -> TrainLoader:
    """This rank's training data, from a saved state or the start on."""
    return TrainLoader(
        shards,
        classification_fields(run),
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


def eval_loader(run: RunConfig, ds_config: dict[str, Any], mesh: Mesh) -> EvalLoader | None:
    """This rank's share of the validation data; None if the run has none. Collective over the world."""
    if not run.data.val_shards:
        return None
    return EvalLoader(
        open_data(run.data.val_shards, run.data, mesh),
        classification_fields(run),
        run.data,
        batch=ds_config["train_micro_batch_size_per_gpu"],
        share=share_of(run.data, mesh),
        cache=_cache(run.data),
    )


def _cache(data: DataConfig) -> ShardCache:
    return ShardCache(data.cache_dir, int(data.cache_gb * 1e9), timeout_s=data.timeout_s)


@torch.no_grad()
def whole_batch(batch: Batch, data: DataConfig, mesh: Mesh) -> tuple[dict[str, Tensor], Tensor]:
    """The fields, by name [b, *shape], and the weights [b] of the whole micro-batch, on the device.

    Under `tp: split` an all-gather over the TP group for each of them, 150 kB an image at 224 pixels.
    """

    def whole(part: Tensor) -> Tensor:
        part = part.to(mesh.device, non_blocking=True)
        return gather_from_tp(mesh, part, 0)[: len(batch.flips)] if data.tp == "split" else part

    return {name: whole(part) for name, part in batch.fields.items()}, whole(batch.weights)


@torch.no_grad()
def to_inputs(batch: Batch, run: RunConfig, mesh: Mesh) -> Inputs:
    """A training micro-batch on the device. Collective over the TP group."""
    fields, weights = whole_batch(batch, run.data, mesh)
    targets = local_targets(run.loss, fields["label"], run.model.num_classes, mesh, run.label_smoothing)
    pixels = to_model_input(fields["image"], mesh.device, batch.flips)
    if batch.blends is not None:
        pixels, targets = blend(pixels, targets, weights, batch.blends)
    return Inputs(pixels, targets, weights)


@torch.no_grad()
def start_counts(batches: list[Batch], stop: bool, data: DataConfig, mesh: Mesh) -> Tensor:
    """The number of usable samples of a step's global batch, and how many ranks were asked to stop: float32
    [2] on the device, the same on all ranks. Nothing waits for it here. One all-reduce over the world."""
    weight = torch.stack([batch.weights.sum() for batch in batches]).sum()
    if data.tp == "replicate" and mesh.tp_rank:
        weight = torch.zeros_like(weight)
    counts = torch.stack([weight, torch.tensor(float(stop))])
    return sum_over_world(mesh, counts.to(mesh.device, non_blocking=True))


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
        for part in batch.fields.values():
            value = crc32(part.numpy().data, value)
    extremes = max_over_tp(mesh, torch.tensor([value, -value], dtype=torch.int64, device=mesh.device))
    if int(extremes.sum()):
        raise ValueError(
            f"the ranks of TP group {mesh.dp_rank} decoded different samples for step {step + 1}: their "
            f"processors or image libraries differ; use --data.tp split, which shares one decoded batch"
        )
