"""Pictures with planes on their way through a model of depth or segmentation: each whole, to a map of the
size of its plane.

Letters: n pictures, H and W the sides of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.data.loader import Items, Share, load_items, worker_log
from megavit.dense_predictor import DensePredictor, Fit, Fitted
from megavit.evaluate.images import Bad, bad_of
from megavit.evaluate.sets.dense import DenseSet
from megavit.parallel.mesh import Mesh

_FEW_PICTURES = 256  # of a set that is read without worker processes: they take seconds to start
_TIMEOUT_S = 600.0


class Pair(NamedTuple):
    """The map of picture `row` and its truth, both [H, W] on the model's device."""

    row: int
    predicted: Tensor
    truth: Tensor


class _Loaded(NamedTuple):
    row: int
    fitted: Fitted
    truth: np.ndarray


class _Reading(Items["_Loaded | Bad"]):
    """Picture i of a set, as the model sees it, and its plane as it is."""

    def __init__(self, images: DenseSet, fit: Fit):
        self.images, self.fit = images, fit
        self.samples = self
        self.record: Callable[[str, int], None] | None = None

    def __getitem__(self, row: int) -> _Loaded | Bad:
        key = f"{self.images.name}[{self.images.numbers[row]}]"
        if self.record:
            self.record(self.images.name, row)
        try:
            sample = self.images.sample(row)
            key = sample.key
            fitted = self.fit(sample.image)
            truth = self.images.values(sample.member, sample.plane, fitted.height, fitted.width)
            return _Loaded(row, fitted, truth)
        except Exception as error:  # one picture must not end the task, whatever a library makes of its bytes
            return bad_of(row, key, error)


class DensePass:
    """The maps of one set by one model. The data-parallel ranks share out the pictures, one at a time; those
    of a TP group have the same ones. Pictures that cannot be used are in `bad` once all are through."""

    def __init__(
        self,
        predictor: DensePredictor,
        images: DenseSet,
        workers: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.predictor, self.images = predictor, images
        self.mesh: Mesh = predictor.module.trunk.mesh
        self.bad: list[Bad] = []
        self._workers, self._progress = workers, progress

    def pairs(self) -> Iterator[Pair]:
        """Of this rank's pictures. Collective over the world at its end, which must be reached; ValueError on
        every rank then, if some could not go on."""
        mesh, bad = self.mesh, []
        mine = range(mesh.dp_rank, len(self.images), mesh.dp_size)
        error = ""
        for done, loaded in enumerate(self._load(mine), 1):
            if isinstance(loaded, Bad):
                bad.append(loaded)
            else:
                try:
                    predicted = self.predictor.predict(loaded.fitted)
                except ValueError as caught:
                    # The others of a TP group wait in a collective, and cannot be told: this process ends.
                    if mesh.tp_size > 1:
                        raise RuntimeError(str(caught)) from caught
                    error = str(caught)
                    break
                yield Pair(loaded.row, predicted, torch.from_numpy(loaded.truth).to(mesh.device))
            self._progress(done, len(mine))
        found = mesh.gather((error, bad))
        if errors := [text for text, _ in found if text]:
            raise ValueError(errors[0])
        self.bad = sorted({one.row: one for _, some in found for one in some}.values())

    def _load(self, rows: range) -> Iterator[_Loaded | Bad]:
        workers = self._workers
        if workers is None and len(rows) < _FEW_PICTURES:
            workers = 0
        count = Share(local_size=self.mesh.local_size).workers(workers)
        items = _Reading(self.images, self.predictor.fit)
        return load_items(items, rows, count, _TIMEOUT_S, 1, worker_log(items, count))
