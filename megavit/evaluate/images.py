"""The images of a set on their way to a model: read, adjusted, cropped and resized, in worker processes.

Letters: b batch, p this rank's part of it, S image side, C channels.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.geometry import NUM_RANDOM, flips, train_box
from megavit.data.images import DecodeError
from megavit.data.lanes import uniforms
from megavit.data.loader import Items, Share, load_items, worker_log
from megavit.data.photos import PhotoReader
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.corruptions import corrupt
from megavit.evaluate.sets.image_set import Adjust, ImageSet, digest_of

_PURPOSE = 5  # of the uniforms: the trainer's have 1 to 4
_FEW_IMAGES = 1024  # of a set that is read without worker processes: they take seconds to start


class Transform:
    """From an image of a set to the pixels that a model takes, as its preprocessing and the set say.

    `digest` names everything that the pixels depend on but the image.
    """

    def __init__(self, preprocessing: Preprocessing, adjust: Adjust):
        if adjust.whole:
            preprocessing = dataclasses.replace(preprocessing, crop=1.0)
        self.preprocessing, self.adjust = preprocessing, adjust
        self._reader = PhotoReader(preprocessing, adjust.border)
        self.text = self._text()
        self.digest = digest_of(
            json.dumps([dataclasses.asdict(preprocessing), dataclasses.asdict(adjust)], sort_keys=True)
        )

    def __call__(self, image: bytes | np.ndarray, key: str) -> Tensor:
        """uint8 [S, S, C] of an image; its name seeds a corruption. ValueError if it is none."""
        pixels = self._reader.load(image)
        if not self.adjust.corruption:
            return pixels
        seed = zlib.crc32(key.encode("utf-8", "surrogateescape"))
        found = corrupt(pixels.numpy(), self.adjust.corruption, self.adjust.severity, seed)
        return torch.from_numpy(found)

    def augmented(self, image: bytes | np.ndarray, augment: Augment, u: np.ndarray) -> Tensor:
        """As for training, by the uniforms `u` [NUM_RANDOM]: uint8 [S, S, C]."""
        config = DataConfig(crop_area=augment.crop_area, flip=augment.flip)
        pixels = self._reader.load(image, lambda width, height: train_box(width, height, config, u))
        return pixels.flip(1) if flips(config, u) else pixels

    def _text(self) -> str:
        """In words, for the results."""
        used, adjust = self.preprocessing, self.adjust
        steps = [f"cut off {adjust.border} px a side"] if adjust.border else []
        steps.append(
            f"central square, {used.crop:g} of the short side" if used.crop < 1 else "central square"
        )
        steps.append(f"{used.interpolation} to {used.image_size} px")
        if adjust.corruption:
            steps.append(f"{adjust.corruption} of severity {adjust.severity}")
        return ", ".join(steps)


@dataclass(frozen=True)
class Augment:
    """A random crop of a share of the area, aspect 3/4 to 4/3, and with `flip` a mirror image half the time.
    They depend on the seed, the epoch and the image's number alone."""

    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    seed: int = 0
    epoch: int = 0


class Bad(NamedTuple):
    """An image that could not be used, by its number, and why."""

    row: int
    reason: str


class Loaded(NamedTuple):
    """The images of one batch on the CPU: this rank's part of it, of p slots, whatever the batch has."""

    rows: Tensor  # int64 [b], numbers in the set
    pixels: Tensor  # uint8 [p, S, S, C]
    failed: Tensor  # uint8 [p], 1 for a slot without an image
    bad: list[Bad]


class _Reading:
    """Reads images one at a time, and says which one first."""

    def __init__(self, images: ImageSet, transform: Transform, augment: Augment | None):
        self.images, self.transform, self.augment = images, transform, augment
        self.record: Callable[[str, int], None] | None = None

    def load(self, row: int) -> Tensor | Bad:
        source = self.images.images
        key = source.key(row)
        if self.record:
            self.record(key, row)
        try:
            if self.augment is None:
                return self.transform(source.read(row), key)
            u = uniforms(NUM_RANDOM, self.augment.seed, _PURPOSE, self.augment.epoch, row)
            return self.transform.augmented(source.read(row), self.augment, u)
        except Exception as error:  # one image must not end the pass, whatever a library makes of its bytes
            return bad_of(row, key, error)


def bad_of(row: int, key: str, error: Exception) -> Bad:
    """Image `row`, called `key`, cannot be used, because reading it raised `error`."""
    if isinstance(error, DecodeError):
        return Bad(row, f"{key}: it cannot be decoded: {error}")
    if isinstance(error, ValueError | OSError):
        reason = str(error)
        return Bad(row, reason if key in reason else f"{key}: {reason}")
    return Bad(row, f"{key}: it cannot be used: {type(error).__name__}: {error}")


class _Batches(Items[Loaded]):
    """Batch number i: the images `batches[i]`, of which this rank decodes its share."""

    def __init__(self, reading: _Reading, batches: Sequence[np.ndarray], share: Share):
        self.samples, self.batches, self.share = reading, batches, share
        used = reading.transform.preprocessing
        self._shape = (used.image_size, used.image_size, used.channels)
        self._reading = reading

    def __getitem__(self, number: int) -> Loaded:
        rows = self.batches[number]
        start, count, padded = self.share.part(len(rows))
        pixels = torch.zeros(padded, *self._shape, dtype=torch.uint8)
        failed = torch.ones(padded, dtype=torch.uint8)
        bad = []
        for slot, row in enumerate(rows[start : start + count].tolist()):
            found = self._reading.load(row)
            if isinstance(found, Bad):
                bad.append(found)
            else:
                pixels[slot], failed[slot] = found, 0
        return Loaded(torch.from_numpy(rows), pixels, failed, bad)


def load_batches(
    images: ImageSet,
    transform: Transform,
    batches: Sequence[np.ndarray],
    share: Share,
    workers: int | None = None,
    augment: Augment | None = None,
    timeout_s: float = 600.0,
) -> Iterator[Loaded]:
    """The images `batches[0]`, `batches[1]`, ... of a set, each an array of numbers, in this order.

    `workers` processes decode; if it is None, one for each core of the rank and at most 4, none for few
    images.
    """
    if workers is None and sum(map(len, batches)) < _FEW_IMAGES:
        workers = 0
    count = share.workers(workers)
    items = _Batches(_Reading(images, transform, augment), batches, share)
    return load_items(items, range(len(batches)), count, timeout_s, 1, worker_log(items, count))
