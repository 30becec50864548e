"""Protocols on the features of a model that is being trained, at whatever ZeRO stage and layout.

What `launch/evaluate.py` does with an export is done with the engine's weights as they stand, and finds the
same. All ranks call the engine equally often, and features stay in memory until the evaluation has ended:
those of `--eval.train_samples` training images and of one validation set, each row on one data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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
from megavit.evaluate.sets.image_set import Adjust, ImageSet
from megavit.evaluate.sets.shards import shard_set
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import gather_from_tp, sum_over_dp, sum_over_world
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

    Reads the labels, on the main rank, but no image. ValueError, before anything is trained, for shards whose
    images do not have one class each. `say` prints a line on the main rank. Collective over the world, as is
    `results`.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, say: Callable[[str], None]):
        self._run, self._say, data = run, say, run.data
        cache = ShardCache(data.cache_dir, int(data.cache_gb * 1e9), timeout_s=data.timeout_s)
        names = tuple(map(str, range(run.model.num_classes)))  # what they are called says nothing here
        options: dict[str, Any] = {"multi_label": False, "cache": cache, "allow_pipe": data.allow_pipe}

        def read(shards: str, name: str, split: Literal["train", "test"], at_most: int | None) -> ImageSet:
            return mesh.on_main(lambda: shard_set(shards, name, split, names, at_most=at_most, **options))

        try:
            self._train = read(data.shards, "training images", "train", run.eval.train_samples)
            self._tests = {one.name: read(one.shards, one.name, "test", None) for one in data.val_sets}
        except ValueError as error:
            raise ValueError(
                f"eval.tasks {run.eval.tasks} needs images that have one class each, of the "
                f"{len(names)} of model.num_classes: {error}"
            ) from error
        self._learned: MemoryFeatures | None = None

    def check(self, engine: Engine) -> None:
        """ValueError if the task's module has no trunk, whose features are what is measured."""
        if not isinstance(getattr(engine.module, "trunk", None), MegaVit):
            raise ValueError(
                f"eval.tasks {self._run.eval.tasks} needs a MegaVit called trunk in the task's module, which "
                f"{type(engine.module).__name__} of task {self._run.task.name} does not have; leave it out"
            )

    def results(self, engine: Engine, name: str, working: Callable[[str], None]) -> dict[str, float]:
        """What the protocols find on the validation set `name`, by metric, e.g. knn20_top1. `working` is told
        what is being done.

        A protocol that finds nothing (features that are not finite, too few usable images) is said and left
        out: training goes on.
        """
        if self._learned is None:
            self._learned = features_of_run(engine, self._train, working)
        test = features_of_run(engine, self._tests[name], working)
        found: dict[str, float] = {}
        try:  # what can go wrong here goes wrong on every rank
            for features in (self._learned, test):
                _require_finite(features)
            for protocol in self._run.eval.names:
                working(f"{protocol} on {name}")
                for one in _PROTOCOLS[protocol](self._learned, [test]):
                    found[_metric(protocol, one)] = one.value
        except ValueError as error:
            self._say(f"note: no more results of eval.tasks on {name}: {error}")
        return found

    def forget(self) -> None:
        """The weights move on: drop the features that were learned from, which all sets of one evaluation
        share."""
        self._learned = None


def _metric(protocol: str, found: Measurement) -> str:
    number = found.settings.get("k", found.settings.get("shots", ""))
    return f"{protocol}{number}_{found.metric}"


def features_of_run(engine: Engine, images: ImageSet, working: Callable[[str], None]) -> MemoryFeatures:
    """The pooled features of a set by the engine's trunk. Collective over the world: all ranks take equally
    many batches of the size of a micro-batch, the last ones filled up."""
    mesh, run, batch_size = engine.mesh, engine.run, engine.micro_batch
    transform = Transform(Preprocessing.of_run(plain_config(run)), Adjust())
    mine = np.arange(mesh.dp_rank, len(images), mesh.dp_size)
    rounds = -(-len(images) // (batch_size * mesh.dp_size))
    batches = [mine[number * batch_size : (number + 1) * batch_size] for number in range(rounds)]
    share = Share(tp_rank=mesh.tp_rank, tp_size=mesh.tp_size, local_size=mesh.local_size)
    failed = torch.zeros(len(images), device=mesh.device)
    pieces: list[Piece] = []
    loaded = load_batches(images, transform, batches, share, run.data.workers, timeout_s=run.data.timeout_s)
    for number, batch in enumerate(loaded):
        working(f"features of {images.name}, batch {number + 1} of {rounds}")
        pixels, bad = (
            gather_from_tp(mesh, part.to(mesh.device, non_blocking=True), 0)[: len(batch.rows)]
            for part in (batch.pixels, batch.failed)
        )
        # Of one shape always, so that compiled blocks are compiled once.
        filled = pad(pixels, (0, 0) * 3 + (0, batch_size - len(pixels)))
        values: Tensor = engine.call(_pooled, filled)[: len(pixels)]
        failed[batch.rows.to(mesh.device)] = bad.float()
        good = bad == 0
        pieces.append(Piece(batch.rows[good.cpu()].numpy(), values[good]))
    flags = sum_over_dp(mesh, failed).cpu().numpy() > 0
    width = pieces[0].values.shape[1]
    return MemoryFeatures(images, POOLED, width, flags, mesh, [piece for piece in pieces if len(piece.rows)])


@torch.no_grad()
def _pooled(module: nn.Module, pixels: Tensor) -> Tensor:
    images = to_model_input(pixels, pixels.device)
    return trunk_features(module.trunk, images, [POOLED])[POOLED]  # type: ignore[arg-type]


def _require_finite(features: MemoryFeatures) -> None:
    wrong = torch.zeros((), device=features.mesh.device)
    for piece in features.mine():
        wrong += (~piece.values.isfinite()).sum()
    if sum_over_world(features.mesh, wrong):
        raise ValueError(f"the features of {features.set.name} are not finite")
