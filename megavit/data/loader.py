"""Batches for one rank: which slots of the global batch are its own, decoded in worker processes, in order.

A work item is one micro-batch, addressed by its number, so the stream does not depend on the number of
workers, and a run can start at any step. The ranks of a TP group share out a micro-batch's decoding (`tp:
split`) or all do it (`replicate`). A sample that cannot be used keeps its slot, filled and with weight 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megavit.data import color, geometry, mixing
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.fields import Batch, Field
from megavit.data.identity import ShardRow, difference, rows_of_run
from megavit.data.json_data import json_field, parse_json
from megavit.data.lanes import MAX_LANES, DataState, Lanes, Order, uniforms
from megavit.data.manifest import Manifest
from megavit.data.samples import Samples
from megavit.data.sources import is_local
from megavit.data.worker import CHECK_S, WorkerLog, start_forkserver, watched

T = TypeVar("T")
_MAX_WORKERS = 4  # processes cost memory: more of them only for whom decoding is too slow


@dataclass(frozen=True)
class Share:
    """Which part of every batch a rank decodes. `tp_size` 1 under `replicate` as well as without TP.

    `local_size` ranks are on its host, to share the cores.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    local_size: int = 1

    def part(self, count: int) -> tuple[int, int, int]:
        """(first slot, slots, padded slots) of this rank's part of `count` slots."""
        padded = -(-count // self.tp_size)
        first = min(count, self.tp_rank * padded)
        return first, min(count, first + padded) - first, padded

    def workers(self, wanted: int | None) -> int:
        """The number of decoding processes: the one that is wanted, or one a core of the rank, and at most 4.

        A launcher may have bound the rank to some cores; else all ranks of the host share them all.
        """
        if wanted is not None:
            return wanted
        equal = max(1, (os.cpu_count() or 1) // self.local_size)
        return min(len(os.sched_getaffinity(0)), equal, _MAX_WORKERS)


class Reads(Protocol):
    """What tells of each sample before it is read: the shard or folder, and the sample's number."""

    record: Callable[[str, int], None] | None


class Items(Dataset[T]):
    """What `load_items` loads, by number. `samples` does the reading."""

    samples: Reads


class _TrainItems(Items[Batch]):
    """Micro-batch number i of this rank: accumulation index i % per_step of step i // per_step."""

    samples: Samples

    def __init__(self, samples: Samples, order: Order, share: Share, micro_batch: int):
        self.samples, self.order, self.share, self.micro_batch = samples, order, share, micro_batch
        per_rank = order.global_batch // share.dp_size
        self.per_step = per_rank // micro_batch
        self.first = share.dp_rank * per_rank
        samples_of = samples.reader.manifest.samples
        self._starts = np.cumsum(samples_of) - samples_of
        self._announced: dict[int, tuple[int, int]] = {}

    def __getitem__(self, item: int) -> Batch:
        step, accumulation = divmod(item, self.per_step)
        first = self.first + accumulation * self.micro_batch
        slots = self.order.slots(step, first, self.micro_batch)
        random = self._random(geometry.NUM_RANDOM, 2, slots.epoch, slots.position)
        start, count, padded = self.share.part(self.micro_batch)
        part = slice(start, start + count)
        batch = self.samples.batch(
            slots.shard[part].tolist(), slots.index[part].tolist(), padded, random[part]
        )
        # Slots 2k and 2k+1 are mixed with each other: pairs that no split into micro-batches separates.
        pairs = np.repeat(slots.position[::2], 2)[: self.micro_batch]
        uniform = self._random(mixing.NUM_MIX_RANDOM, 4, slots.epoch, pairs)
        blends = mixing.blends(self.samples.picture.size, self.samples.config, uniform)
        uniform = self._random(color.NUM_COLOR_RANDOM, 5, slots.epoch, slots.position)
        colors = color.color_changes(self.samples.config, uniform)
        self._prefetch(step, first)
        return batch._replace(
            flips=torch.from_numpy(geometry.flips(self.samples.config, random)),
            blends=None if blends is None else torch.from_numpy(blends),
            colors=None if colors is None else torch.from_numpy(colors),
            numbers=torch.from_numpy(self._starts[slots.shard] + slots.index),
        )

    def _random(self, count: int, purpose: int, epoch: int, position: np.ndarray) -> np.ndarray:
        return uniforms(count, self.order.lanes.seed, purpose, epoch, position)

    def _prefetch(self, step: int, first: int) -> None:
        """Start fetching the shards of the next block of the lanes that this micro-batch reads."""
        if not self.samples.reader.has_remote:
            return
        epoch, position = self.order.place(step)
        lanes, per_lane = self.order.lanes, self.order.per_lane
        ahead = position - position % lanes.block + lanes.block
        place = (epoch, ahead) if ahead < lanes.length else (epoch + 1, 0)
        if self._announced.get(first) != place:
            self._announced[first] = place
            mine = np.arange(first // per_lane, (first + self.micro_batch - 1) // per_lane + 1)
            self.samples.reader.prefetch(lanes.block_shards(*place, mine))


class _EvalItems(Items[Batch]):
    """Batch number i of this rank's share, every dp_size-th sample in file order; rows beyond the end are
    empty."""

    samples: Samples

    def __init__(self, samples: Samples, share: Share, batch: int):
        self.samples, self.share, self.batch = samples, share, batch
        self._ends = np.cumsum(samples.reader.manifest.samples)

    def __getitem__(self, item: int) -> Batch:
        start, count, padded = self.share.part(self.batch)
        first = item * self.batch + start
        numbers = np.arange(first, first + count) * self.share.dp_size + self.share.dp_rank
        numbers = numbers[numbers < self._ends[-1]]
        shards = np.searchsorted(self._ends, numbers, side="right")
        indexes = numbers - (self._ends[shards] - self.samples.reader.manifest.samples[shards])
        batch = self.samples.batch(shards.tolist(), indexes.tolist(), padded, None)
        return batch._replace(flips=torch.zeros(self.batch, dtype=torch.bool))


class TrainLoader:
    """This rank's micro-batches of the training data; endless, from any step.

    `state` is what `state_at` gave when the run was saved. `dp_size` and workers may have changed since, and
    the global batch as long as it stays a multiple of the lanes. `left_out` are ranges of steps as in
    `config.skips`, found while training. ValueError, naming the difference, if the shards have changed and
    the configuration does not allow it; `data_file`, which `save_order` wrote, tells which shard it was.
    """

    def __init__(
        self,
        manifest: Manifest,
        fields: Sequence[Field],
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        share: Share = Share(),
        cache: ShardCache | None = None,
        state: DataState | None = None,
        data_file: Path | None = None,
        left_out: Sequence[tuple[int, int]] = (),
    ):
        if (config.mixup or config.cutmix) and micro_batch % 2:
            raise ValueError(
                f"mixup and cutmix mix pairs of slots: the micro-batch must be even, got {micro_batch}"
            )
        self._digests = manifest.digest, manifest.checksum_digest
        if (
            state
            and not manifest.is_same(state.manifest, state.checksums)
            and not config.allow_changed_manifest
        ):
            raise ValueError(_changed(manifest, state, rows_of_run(data_file)))
        num_lanes = config.lanes or (state.num_lanes if state else math.gcd(global_batch, MAX_LANES))
        lanes = Lanes(manifest.samples, num_lanes, seed, config.shuffle_block, config.share)
        self.order = Order(lanes, global_batch, sorted({*config.skips, *left_out}), state)
        samples = Samples(manifest, fields, config, cache)
        self._items = _TrainItems(samples, self.order, share, micro_batch)
        self._config, self._manifest = config, manifest
        self._workers = share.workers(config.workers)
        self._log: WorkerLog | None = None

    def passes(self, step: int) -> float:
        """Passes over the data before `step`."""
        return self.order.passes(step)

    def state_at(self, step: int) -> dict[str, Any]:
        """Where the data stand before `step`, for a checkpoint (JSON); `DataState.from_json` reads it."""
        epoch, position = self.order.place(step)
        lanes = self.order.lanes
        return DataState(
            step=step,
            epoch=epoch,
            position=position,
            num_lanes=lanes.num_lanes,
            block=lanes.block,
            seed=lanes.seed,
            skipped=tuple(skip for skip in self.order.skips if skip[0] <= step),
            manifest=self._digests[0],
            checksums=self._digests[1],
            shards=len(self._manifest),
            samples=self._manifest.num_samples,
            fraction=str(lanes.share),
        ).to_json()

    def save_order(self, path: Path, step: int) -> None:
        """Write what tells the samples of any step from `step` on (`launch/shards.py which`).

        A file that says the same from an earlier step on keeps that step, to tell those before as well.
        """
        shards = self._config.shards
        fields = {
            "shards": str(Path(shards).absolute()) if is_local(shards) else shards,
            "global_batch": self.order.global_batch,
            "skips": [list(skip) for skip in self.order.skips],
            "state": self.state_at(step),
            "content": self._manifest.rows(),
        }
        if step and (state := self._state_in(path, fields)):
            fields["state"] = state
        path.write_text(json.dumps(fields) + "\n")

    def _state_in(self, path: Path, fields: dict[str, Any]) -> dict[str, Any] | None:
        """The state in an order file, if that tells of the same order as `fields` and the same shards."""
        try:
            before = parse_json(path.read_bytes())
            state = DataState.from_json(json_field(before, "state", dict))
        except (FileNotFoundError, ValueError):  # none, or one that tells nothing
            return None
        same = all(before.get(name) == fields[name] for name in ("shards", "global_batch", "skips"))
        return before["state"] if same and self._manifest.is_same(state.manifest, state.checksums) else None

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The micro-batches of optimizer steps [first_step, last_step), in order."""
        per_step = self._items.per_step
        numbers = range(first_step * per_step, last_step * per_step)
        self._log = worker_log(self._items, self._workers)
        # The loop takes a whole step's micro-batches at once.
        return load_items(self._items, numbers, self._workers, self._config.timeout_s, per_step, self._log)

    def reading(self) -> str:
        """What the data workers read last, a line each, for the report of a hang."""
        last = self._log.read() if self._log else {}
        return "\n".join(f"data worker {pid} last read {sample}" for pid, sample in last.items())


class EvalLoader:
    """The whole validation set, each sample on exactly one DP rank, the same number of batches on every
    rank."""

    def __init__(
        self,
        manifest: Manifest,
        fields: Sequence[Field],
        config: DataConfig,
        *,
        batch: int,
        share: Share = Share(),
        cache: ShardCache | None = None,
    ):
        self.num_samples = manifest.num_samples
        self.num_batches = -(-self.num_samples // (batch * share.dp_size))
        self._items = _EvalItems(Samples(manifest, fields, config, cache), share, batch)
        self._workers, self._timeout_s = share.workers(config.workers), config.timeout_s

    def __iter__(self) -> Iterator[Batch]:
        log = worker_log(self._items, self._workers)
        return load_items(self._items, range(self.num_batches), self._workers, self._timeout_s, 1, log)


def _changed(manifest: Manifest, state: DataState, before: Sequence[ShardRow]) -> str:
    found = difference(manifest.rows(), before) if before else ""
    if not found:
        found = (
            f"{len(manifest):,} shards with {manifest.num_samples:,} samples (digest {manifest.digest[:8]}) "
            f"now, {state.shards:,} with {state.samples:,} ({state.manifest[:8]}) when it was saved"
        )
    return (
        f"the training shards have changed since step {state.step}: {found}. Restore them, or go on in "
        f"another order with --data.allow_changed_manifest"
    )


def worker_log(items: Items[Any], workers: int) -> WorkerLog:
    """Records what is being read; without worker processes this process is the one that reads."""
    log = WorkerLog(max(1, workers))
    items.samples.record = None if workers else log.record(0)
    return log


def load_items(
    items: Items[T], numbers: Sequence[int], workers: int, timeout_s: float, ahead: int, log: WorkerLog
) -> Iterator[T]:
    """The items with these numbers in order, in worker processes that keep at least `ahead` of them ready,
    twice."""
    pin = torch.cuda.is_available()
    if not workers:
        return iter(
            DataLoader(items, batch_size=None, sampler=numbers, pin_memory=pin, collate_fn=_unchanged)
        )
    start_forkserver()
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_unchanged,
        # forking a process that holds CUDA or gloo threads is not safe
        multiprocessing_context="forkserver",
        pin_memory=pin,
        prefetch_factor=max(2, -(-2 * ahead // workers)),
        timeout=min(CHECK_S, timeout_s),
        worker_init_fn=log,
    )
    return watched(iter(loader), log, timeout_s)


def _unchanged(item: T) -> T:
    """An item as it was made: torch would make tensors of its arrays."""
    return item
