"""Protocols on the features of a model that is being trained, at whatever ZeRO stage and layout.

What `launch/evaluate.py` does with an export is done with the engine's weights as they stand. All ranks call
the engine equally often, and features stay in memory: those of `--eval.train_samples` training images and of
the validation sets, each row on one data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megavit.data.cache import ShardCache
from megavit.data.device import to_model_input
from megavit.data.loader import Share
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.features import Features, MemoryFeatures, Piece
from megavit.evaluate.images import Transform, load_batches
from megavit.evaluate.model import POOLED, trunk_features
from megavit.evaluate.protocols.fewshot import fewshot
from megavit.evaluate.protocols.knn import knn
from megavit.evaluate.protocols.linear import linear
from megavit.evaluate.results import Measurement
from megavit.evaluate.sets.catalogue import Split
from megavit.evaluate.sets.image_set import Adjust, ImageSet
from megavit.evaluate.sets.shards import shard_set
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import gather_from_tp, sum_over_dp
from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig, plain_config
from megavit.train.engine import Engine

_PROTOCOLS: dict[str, Callable[[Features, list[Features]], Iterator[Measurement]]] = {
    "knn": knn,
    "fewshot": fewshot,
    "linear": linear,
}


class Probes:
    """The protocols of `--eval.tasks` for one run.

    Collective over the world, as is `results`. ValueError, before anything is trained, for shards whose
    images do not have one class each.
    """

    def __init__(self, run: RunConfig, mesh: Mesh):
        self._run = run
        self._tests: dict[str, ImageSet] = {}
        if run.eval.names:
            data = run.data
            cache = ShardCache(data.cache_dir, int(data.cache_gb * 1e9), timeout_s=data.timeout_s)
            names = tuple(map(str, range(run.model.num_classes)))  # what they are called says nothing here
            options: dict[str, Any] = {"multi_label": False, "cache": cache, "allow_pipe": data.allow_pipe}

            def read(shards: str, name: str, at_most: int | None = None) -> ImageSet:
                split: Split = "test" if at_most is None else "train"
                return mesh.on_main(lambda: shard_set(shards, name, split, names, at_most=at_most, **options))

            self._train = read(data.shards, "training images", run.eval.train_samples)
            self._tests = {one.name: read(one.shards, one.name) for one in data.val_sets}
        self._step = -1
        self._learned: MemoryFeatures | None = None

    def results(
        self, engine: Engine, name: str, step: int, working: Callable[[str], None]
    ) -> dict[str, float]:
        """What the protocols find on the validation set `name` after `step` updates, by metric, e.g.
        knn20_top1. `working` is told what is being done."""
        if name not in self._tests:
            return {}
        batch_size = engine.micro_batch
        if self._step != step or self._learned is None:
            self._learned = features_of_run(engine, self._train, batch_size, working)
            self._step = step
        test = features_of_run(engine, self._tests[name], batch_size, working)
        found: dict[str, float] = {}
        for protocol in self._run.eval.names:
            working(f"{protocol} on {name}")
            for one in _PROTOCOLS[protocol](self._learned, [test]):
                found[_metric(protocol, one)] = one.value
        return found


def _metric(protocol: str, found: Measurement) -> str:
    number = found.settings.get("k", found.settings.get("shots", ""))
    return f"{protocol}{number}_{found.metric}"


def features_of_run(
    engine: Engine, images: ImageSet, batch_size: int, working: Callable[[str], None]
) -> MemoryFeatures:
    """The pooled features of a set by the engine's trunk. Collective over the world: all ranks take equally
    many batches, the last ones perhaps empty."""
    mesh, run = engine.mesh, engine.run
    transform = Transform(Preprocessing.of_run(plain_config(run)), Adjust())
    mine = np.arange(mesh.dp_rank, len(images), mesh.dp_size)
    rounds = -(-len(images) // (batch_size * mesh.dp_size))
    batches = [mine[number * batch_size : (number + 1) * batch_size] for number in range(rounds)]
    share = Share(tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, local_size=mesh.local_size)
    failed = torch.zeros(len(images), device=mesh.device)
    pieces: list[Piece] = []
    for number, batch in enumerate(load_batches(images, transform, batches, share, run.data.workers)):
        working(f"features of {images.name}, batch {number + 1} of {rounds}")
        pixels, bad = (
            gather_from_tp(mesh, part.to(mesh.device, non_blocking=True), 0)[: len(batch.rows)]
            for part in (batch.pixels, batch.failed)
        )
        values: Tensor = engine.call(_pooled, pixels)
        failed[batch.rows.to(mesh.device)] = bad.float()
        good = bad == 0
        pieces.append(Piece(batch.rows[good.cpu()].numpy(), values[good]))
    flags = sum_over_dp(mesh, failed).cpu().numpy() > 0
    width = pieces[0].values.shape[1]
    return MemoryFeatures(images, POOLED, width, flags, mesh, [piece for piece in pieces if len(piece.rows)])


@torch.no_grad()
def _pooled(module: nn.Module, pixels: Tensor) -> Tensor:
    trunk = next(part for part in module.modules() if isinstance(part, MegaVit))
    return trunk_features(trunk, to_model_input(pixels, pixels.device), [POOLED])[POOLED]
