"""Batches for one rank: which slots of the global batch are its own, decoded in worker processes, in order.

A work item is one micro-batch, addressed by its number, so the stream does not depend on the number of
workers, and a run can start at any step. Ranks of one TP group ask for the same slots and decode the same
images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megavit.config import DataConfig, ModelConfig
from megavit.data.index import ShardIndex, ShardReader
from megavit.data.lanes import Lanes, uniforms
from megavit.data.transforms import NUM_RANDOM, decode, eval_transform, train_transform

Batch = tuple[Tensor, Tensor]  # images uint8 [b, S, S, C], class ids int64 [b]


# What PIL raises for damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class SampleError(ValueError):
    """A sample cannot be used; the message names shard, key and reason."""


class _Decoder:
    """Reads and decodes single samples; any failure names the shard and the key."""

    def __init__(self, shards: Sequence[ShardIndex], model: ModelConfig, config: DataConfig):
        self.reader, self.model, self.config = ShardReader(shards), model, config

    def load(self, shard: int, index: int, u: np.ndarray | None) -> tuple[np.ndarray, int]:
        """(uint8 [S, S, C], class id); augmented with the uniforms `u`, or by the evaluation transform if
        None."""
        entry = self.reader.shards[shard]
        image_bytes, label_bytes = self.reader.read(shard, index)
        label = self._label(label_bytes, entry, index)
        try:
            image = decode(image_bytes, self.model.channels)
            if u is None:
                return eval_transform(image, self.model.image_size, self.config), label
            return train_transform(image, self.model.image_size, self.config, u), label
        except _DECODE_ERRORS as error:
            raise SampleError(
                f"{entry.path}: sample {entry.keys[index]!r} cannot be decoded: {error}"
            ) from error

    def _label(self, data: bytes, entry: ShardIndex, index: int) -> int:
        text = data.decode("utf-8", "replace").strip()
        classes = self.model.num_classes
        if not text.lstrip("-").isdecimal():
            raise SampleError(
                f"{entry.path}: sample {entry.keys[index]!r}: label {text[:40]!r} is not a class number"
            )
        if not 0 <= int(text) < classes:
            raise SampleError(
                f"{entry.path}: sample {entry.keys[index]!r}: label {text} is outside 0..{classes - 1}; "
                f"set --model.num_classes to the data's"
            )
        return int(text)


class _TrainItems(Dataset[Batch]):
    """Micro-batch number i of this rank: accumulation index i % grad_accum of step i // grad_accum."""

    def __init__(
        self, decoder: _Decoder, lanes: Lanes, seed: int, dp_rank: int, dp_size: int, micro_batch: int
    ):
        self.decoder, self.lanes, self.seed = decoder, lanes, seed
        self.micro_batch = micro_batch
        self.share = lanes.global_batch // dp_size
        self.first = dp_rank * self.share

    def __getitem__(self, item: int) -> Batch:
        step, accumulation = divmod(item, self.share // self.micro_batch)
        slots = self.lanes.slots(step, self.first + accumulation * self.micro_batch, self.micro_batch)
        random = uniforms(NUM_RANDOM, self.seed, 2, slots.epoch, slots.position)
        places = zip(slots.shard.tolist(), slots.index.tolist(), random, strict=True)
        return _stack([self.decoder.load(shard, index, u) for shard, index, u in places])


class _EvalItems(Dataset[Batch]):
    """Batch number i of this rank's share, every dp_size-th sample in file order; shorter at the end.

    A rank with nothing left gets one black image labelled -1, since all ranks must run the model equally
    often.
    """

    def __init__(
        self, decoder: _Decoder, places: Sequence[tuple[int, int]], dp_rank: int, dp_size: int, batch: int
    ):
        self.decoder, self.batch = decoder, batch
        self.places = places[dp_rank::dp_size]

    def __getitem__(self, item: int) -> Batch:
        places = self.places[item * self.batch : (item + 1) * self.batch]
        size, channels = self.decoder.model.image_size, self.decoder.model.channels
        if not places:
            return _stack([(np.zeros((size, size, channels), np.uint8), -1)])
        return _stack([self.decoder.load(shard, index, None) for shard, index in places])


def _stack(samples: Sequence[tuple[np.ndarray, int]]) -> Batch:
    images = torch.from_numpy(np.stack([image for image, _ in samples]))
    return images, torch.tensor([label for _, label in samples], dtype=torch.int64)


class TrainLoader:
    """This rank's micro-batches of the training data; endless, from any step."""

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        model: ModelConfig,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
    ):
        self.lanes = Lanes([len(shard) for shard in shards], global_batch, seed)
        self._items = _TrainItems(
            _Decoder(shards, model, config), self.lanes, seed, dp_rank, dp_size, micro_batch
        )
        self._workers = config.workers
        self._per_step = global_batch // dp_size // micro_batch

    def epoch_at(self, step: int) -> float:
        """Passes over the data before `step`."""
        return step / self.lanes.steps_per_epoch

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The micro-batches of optimizer steps [first_step, last_step), in order."""
        numbers = range(first_step * self._per_step, last_step * self._per_step)
        return iter(_loader(self._items, numbers, self._workers))


class EvalLoader:
    """The whole validation set, each sample on exactly one DP rank, the same number of batches on every
    rank."""

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        model: ModelConfig,
        config: DataConfig,
        *,
        batch: int,
        dp_rank: int,
        dp_size: int,
    ):
        places = [(shard, index) for shard, entry in enumerate(shards) for index in range(len(entry))]
        self.num_samples = len(places)
        self.num_batches = -(-self.num_samples // (batch * dp_size))
        self._items = _EvalItems(_Decoder(shards, model, config), places, dp_rank, dp_size, batch)
        self._workers = config.workers

    def __iter__(self) -> Iterator[Batch]:
        return iter(_loader(self._items, range(self.num_batches), self._workers))


def _loader(items: Dataset[Batch], numbers: range, workers: int) -> DataLoader[Batch]:
    # 'forkserver': forking a process that holds CUDA or gloo threads is not safe.
    context = "forkserver" if workers else None
    return DataLoader(
        items,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
    )
