"""Where a training image comes from: its shard, its key, and the optimizer steps that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from megavit.data.audit import order_of_run
from megavit.data.identity import ShardRow
from megavit.data.lanes import Order
from megavit.data.manifest import Manifest
from megavit.evaluate.sets.image_set import Chosen, ImageSet
from megavit.evaluate.sets.shards import ShardImages
from megavit.model.exported import export_folder
from megavit.model.vit import WEIGHTS_FILE


@dataclass(frozen=True)
class TrainingImage:
    """One image of the training set, and what was found of it.

    Args:
        row: its number in the set, whose `images.read(row)` gives its pixels.
        key: its name: shard/key, or a path.
        label: the class id; the first one of several, -1 without.
        label_name: the names of all its classes.
        value: what it is listed for: a similarity, or an influence.
        shard: path or url of the shard; "" for images that lie in none.
        index: number of the sample in the shard, -1 for images that lie in none.
        steps: the optimizer steps that read it, as they are logged (from 1 on, see `launch/shards.py which`);
            None if it is not known what the run read.
    """

    row: int
    key: str
    label: int
    label_name: str
    value: float
    shard: str = ""
    index: int = -1
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Readings:
    """What the run that made a model has read, of the steps that its folder tells: `first` to `last`, as they
    are logged."""

    order: Order
    shards: Sequence[ShardRow]
    first: int
    last: int

    @staticmethod
    def of_run(run_dir: str | Path) -> Readings:
        """From a run folder with an export. ValueError, naming the reason, if it does not tell the order, the
        shards have changed since, or there is no export, from which the last step is known."""
        run_dir = Path(run_dir)
        manifest, order = order_of_run(run_dir)
        return Readings(order, manifest.rows(), order.first_step + 1, _step_of_export(run_dir))

    def steps(self, images: ImageSet, rows: Sequence[int]) -> list[tuple[int, ...] | None]:
        """The steps, as they are logged, that read each of these images of a set; None for an image in no
        shard of the run. O(shards) for each epoch of the run, O(1) for an image and epoch."""
        steps: list[tuple[int, ...] | None] = [None] * len(rows)
        found = places(images, rows)
        if found is None:
            return steps
        manifest, shard, index = found
        theirs = manifest.rows()
        numbers = {one: self._number(theirs[one]) for one in set(shard.tolist())}
        number = np.array([numbers[one] for one in shard.tolist()], np.int64)
        known = np.flatnonzero(number >= 0)
        read = self.order.steps_of(number[known], index[known], self.last)
        for i, those in zip(known.tolist(), read, strict=True):
            steps[i] = tuple(step + 1 for step in those)
        return steps

    def _number(self, shard: ShardRow) -> int:
        """Of a shard in the run's order; -1 if it read no such shard."""
        return next((number for number, mine in enumerate(self.shards) if mine.is_same(shard)), -1)


def places(images: ImageSet, rows: Sequence[int]) -> tuple[Manifest, np.ndarray, np.ndarray] | None:
    """The shards of a set, and for each row the number of its shard and of the sample in it, int64; None for
    images that lie in none."""
    source, numbers = images.images, list(rows)
    while isinstance(source, Chosen):
        numbers = source.numbers[numbers].tolist()
        source = source.images
    if not isinstance(source, ShardImages):
        return None
    found = np.array([source.place(number) for number in numbers], np.int64).reshape(-1, 2)
    return source.reader.manifest, found[:, 0], found[:, 1]


def described(
    images: ImageSet, rows: Sequence[int], values: Sequence[float], readings: Readings | None = None
) -> list[TrainingImage]:
    """The images with all that is known of them. Reads the indexes of their shards, and no image."""
    found = places(images, rows)
    steps = readings.steps(images, rows) if readings else [None] * len(rows)
    result = []
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        labels = [label for label in images.labels[row].tolist() if label >= 0]
        names = ", ".join(images.class_names[label] for label in labels)
        shard, index = ("", -1) if found is None else (found[0].urls[found[1][i]], int(found[2][i]))
        key, label = images.images.key(row), labels[0] if labels else -1
        result.append(TrainingImage(row, key, label, names, value, shard, index, steps[i]))
    return result


def _step_of_export(run_dir: Path) -> int:
    path = export_folder(run_dir) / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not tell after which step it was written ({error}); export it again with "
            f"launch/export.py"
        ) from error
