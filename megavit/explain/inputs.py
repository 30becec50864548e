"""The images that a command is asked to explain: photos, and samples of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from megavit.data.class_names import CLASSES_FILE
from megavit.data.photos import photos_in
from megavit.evaluate.sets.image_set import ImageSet
from megavit.evaluate.sets.shards import own_data, shard_set
from megavit.explain.explainer import Subject
from megavit.predictor import Predictor

NUM = 8  # images of a data set, if nobody says how many


class _Item(NamedTuple):
    """An image that is yet to be read."""

    name: str
    read: Callable[[], bytes | np.ndarray]
    label: str = ""


class Inputs:
    """Photos, folders of photos, and `num` images of a data set, in this order; read when they are asked for.

    `miss(text)` is told what cannot be explained, and `num_missed` counts it. ValueError if there is nothing
    at all, or no data.
    """

    def __init__(
        self,
        predictor: Predictor,
        photos: Sequence[Path],
        data: str,
        num: int | None,
        miss: Callable[[str], None],
    ):
        self._predictor, self._tell, self.num_missed = predictor, miss, 0
        self._items: list[_Item] = []
        self.data_digest: str | None = None
        for given in photos:
            files = photos_in(given) if given.is_dir() else [given]
            if not files:
                self._miss(f"{given}: this folder holds no photos")
            self._items += [_Item(str(path), path.read_bytes) for path in files]
        if data:
            images = images_of(data, predictor.names).first(num or NUM)
            self.data_digest = images.digest
            self._items += [_item(images, row) for row in range(len(images))]
        if not self._items:
            raise ValueError(
                "there is nothing to explain: name photos, or images of a data set with --data DIR"
            )

    def __len__(self) -> int:
        return len(self._items)

    def _miss(self, text: str) -> None:
        self.num_missed += 1
        self._tell(text)

    def read(self, numbers: range) -> list[Subject]:
        """Those of the images with these numbers that can be used."""
        items, files, digests = [], [], []
        for item in self._items[numbers.start : numbers.stop]:
            try:
                file = item.read()
            except (ValueError, OSError) as error:
                self._miss(f"{item.name}: {getattr(error, 'strerror', None) or error}")
                continue
            items.append(item)
            files.append(file)
            digests.append(sha256(file if isinstance(file, bytes) else file.tobytes()).hexdigest())
        subjects = []
        for item, digest, pixels in zip(items, digests, self._predictor.prepare(files), strict=True):
            if isinstance(pixels, Tensor):
                subjects.append(Subject(item.name, pixels, digest, item.label))
            else:
                self._miss(f"{item.name}: {pixels}")
        return subjects


def images_of(data: str, names: Sequence[str]) -> ImageSet:
    """The test images in a folder, else its training images; those of a manifest or a pattern of shards."""
    path = Path(data)
    if path.is_dir():
        sets = own_data(path, () if (path / CLASSES_FILE).is_file() else names)
        return sets.get("test") or sets["train"]
    return shard_set(data, path.name, "test", () if (path.parent / CLASSES_FILE).is_file() else names)


def _item(images: ImageSet, row: int) -> _Item:
    labels = [images.class_names[label] for label in images.labels[row].tolist() if label >= 0]
    source: Any = images.images
    return _Item(source.key(row), lambda: source.read(row), ", ".join(labels))
