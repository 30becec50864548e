"""What every data set is to the protocols: images in an order that never changes, and their labels.

Letters: n images, M labels of an image at most, H and W the sides of an image, C channels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

# Sets of fewer bytes are told apart by their content, larger ones by the names, sizes and times of files.
_HASHED_BYTES = 256 << 20


class MissingData(ValueError):
    """A data set, or a part of it, is not there. The message names the path that was expected, its layout,
    and where the data are to be had."""


class Images(Protocol):
    """Where the images of a set are. Pickled into worker processes: it holds no open files."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """What messages and results call the image: a path relative to the set's folder, or shard/key."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """An encoded file's bytes, or pixels uint8 [H, W] or [H, W, C]. ValueError or OSError if the image
        cannot be read."""
        ...


@dataclass(frozen=True)
class Adjust:
    """What is done to an image of a set before, or in place of, the model's own transform.

    Args:
        border: pixels to cut off on every side (ObjectNet: 2).
        whole: take the largest central square instead of the model's crop, since the set was cropped already
            (ImageNet-C at 224 pixels); it is still resized to the model's side.
        corruption: name of a corruption that is made on the fly, or "".
        severity: 1 to 5, of the corruption.
    """

    border: int = 0
    whole: bool = False
    corruption: str = ""
    severity: int = 0


@dataclass(frozen=True)
class ImageSet:
    """A split of a data set.

    Args:
        name: what tables call it, e.g. imagenet-a.
        split: train or test.
        images: where the images are.
        labels: int64 [n, M], class ids of the label space, filled up with -1.
        class_names: of the label space, by id.
        space: name of the label space. A classifier can be scored on a set if both have the same one;
            "imagenet" is ILSVRC 2012's 1000 classes in the order of their sorted WordNet ids.
        right: which predictions are right. "one": there is one label. "any": each of the labels is (ReaL,
            ObjectNet); an image without one is left out of the score. "all": all labels apply (multi-label).
        candidates: int64 [K], the only classes that may be predicted, None for all (ImageNet-A: 200).
        digest: of the images, in their order.
        adjust: what is done to them.
        groups: further columns by name, int64 [n] (CelebA's attributes).
    """

    name: str
    split: Literal["train", "test"]
    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    space: str
    digest: str
    right: Literal["one", "any", "all"] = "one"
    candidates: np.ndarray | None = None
    adjust: Adjust = Adjust()
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.labels.dtype == np.int64 and self.labels.ndim == 2, self.labels
        assert len(self.labels) == len(self.images), (len(self.labels), len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> ImageSet:
        """`count` images spread evenly over the set, for a trial; itself if it has no more."""
        if count >= len(self):
            return self
        chosen = np.arange(count) * len(self) // count
        return dataclasses.replace(
            self,
            images=Chosen(self.images, chosen),
            labels=self.labels[chosen],
            digest=digest_of(self.digest, count),
            groups={name: values[chosen] for name, values in self.groups.items()},
        )

    def adjusted(self, adjust: Adjust) -> ImageSet:
        return dataclasses.replace(self, adjust=adjust)


@dataclass(frozen=True)
class Chosen:
    """Some of the images, by number."""

    images: Images
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, index: int) -> str:
        return self.images.key(int(self.numbers[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        return self.images.read(int(self.numbers[index]))


@dataclass(frozen=True)
class Files:
    """Image files below `root`, by their paths relative to it."""

    root: str
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return (Path(self.root) / self.paths[index]).read_bytes()

    def digest(self) -> str:
        """Of the names, and of the contents if they are few bytes, else of their sizes and times."""
        stats = [os.stat(Path(self.root) / path) for path in self.paths]
        if sum(stat.st_size for stat in stats) <= _HASHED_BYTES:
            return digest_of(*(part for path in self.paths for part in (path, _content(self.root, path))))
        rows = zip(self.paths, stats, strict=True)
        return digest_of(*(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in rows))


@dataclass(frozen=True)
class Pixels:
    """Images in memory: uint8 [n, H, W] or [n, H, W, C]. They travel to every worker: for small sets."""

    name: str
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def digest(self) -> str:
        return digest_of(self.pixels.shape, self.pixels.tobytes())


def one_label(ids: Iterable[int]) -> np.ndarray:
    """The labels of a set with one class an image: int64 [n, 1]."""
    return np.fromiter(ids, np.int64).reshape(-1, 1)


def label_lists(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """The labels of a set with several classes an image: int64 [n, M], filled up with -1; M is at least 1."""
    labels = np.full((len(lists), max([1, *map(len, lists)])), -1, np.int64)
    for row, ids in zip(labels, lists, strict=True):
        row[: len(ids)] = ids
    return labels


def digest_of(*parts: object) -> str:
    """A digest of some values (bytes as they are, others as `str` has them), in their order."""
    found = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _content(root: str, path: str) -> bytes:
    return blake2b((Path(root) / path).read_bytes(), digest_size=16).digest()
