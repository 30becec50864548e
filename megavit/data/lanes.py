"""The order of training samples: "lanes", a pure function of (seed, epoch, turn, global batch).

The shards of an epoch, permuted, form one line of samples, rotated by a random amount and cut into L equal
lanes; what does not fill a lane or a step is left out, other samples each epoch. Slot j of a global batch
reads lane j // m (m = global_batch / L). A lane is cut into blocks, and within a block the samples are
permuted, so that a lane reads few shards at a time. Which samples make up a step does not depend on ranks,
workers or what was read before, and any step can be computed at once. All arithmetic is on 64-bit integers
(splitmix64), tied to no library's random stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from fractions import Fraction
from typing import Any

import numpy as np

from megavit.data.json_data import json_field, kind_of

MAX_LANES = 1024
_ROUNDS = 6
_U64 = np.uint64


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of integers or integer arrays (broadcast), each step one round of splitmix64."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(k) for k in keys)), _U64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state * _U64(0xD1342543DE82EF95) + np.asarray(key).astype(_U64) + _U64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> _U64(27))) * _U64(0x94D049BB133111EB)
            state = state ^ (state >> _U64(31))
    return state


def uniforms(count: int, *keys: int | np.ndarray) -> np.ndarray:
    """[..., count] float64 in [0, 1) that depend on the keys (integers or arrays of shape [...]) only."""
    return (mix(*(np.asarray(key)[..., None] for key in keys), np.arange(count)) >> _U64(11)) * 2.0**-53


def permutation(count: int, *keys: int) -> np.ndarray:
    """A permutation of range(count) that depends on `keys` only."""
    return np.argsort(mix(*keys, np.arange(count)), kind="stable")


def shuffled(index: np.ndarray, count: np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """Where `index` goes in a permutation of range(count) that depends on `keys` only; elementwise int64
    arrays.

    A Feistel network with modular addition on a grid of a x b >= count cells, repeated until it lands below
    `count`: constant memory and time, where an explicit permutation would hold every lane's. One turn in
    sqrt(count) is repeated.
    """
    base = mix(*keys)
    a = np.ceil(np.sqrt(count)).astype(np.int64)
    b = -(-count // a)
    place = np.broadcast_to(index, np.broadcast_shapes(index.shape, base.shape)).copy()
    todo = np.ones(place.shape, bool)
    while todo.any():
        column, row = place % a, place // a
        for turn in range(0, _ROUNDS, 2):
            column = (column + (mix(base, turn, row) >> _U64(1)).astype(np.int64)) % a
            row = (row + (mix(base, turn + 1, column) >> _U64(1)).astype(np.int64)) % b
        place = np.where(todo, column + a * row, place)
        todo = place >= count
    return place


def unshuffled(place: np.ndarray, count: np.ndarray, *keys: int | np.ndarray) -> np.ndarray:
    """Which index `shuffled` puts at `place`, for the same `count` and `keys`: its rounds backwards."""
    base = mix(*keys)
    a = np.ceil(np.sqrt(count)).astype(np.int64)
    b = -(-count // a)
    index = np.broadcast_to(place, np.broadcast_shapes(place.shape, base.shape)).copy()
    todo = np.ones(index.shape, bool)
    while todo.any():
        column, row = index % a, index // a
        for turn in reversed(range(0, _ROUNDS, 2)):
            row = (row - (mix(base, turn + 1, column) >> _U64(1)).astype(np.int64)) % b
            column = (column - (mix(base, turn, row) >> _U64(1)).astype(np.int64)) % a
        index = np.where(todo, column + a * row, index)
        todo = index >= count
    return index


@dataclass(frozen=True)
class Slots:
    """Samples of a global batch, int64 [n] each: where they lie, and the key (epoch, position) of their
    augmentation."""

    shard: np.ndarray
    index: np.ndarray
    position: np.ndarray
    epoch: int


class _Part:
    """Every sample of shards of `counts` samples, or a share of them that is spread evenly: with p/q the
    sample number n is kept if a multiple of q/p lies in (n, n + 1]. So of two shares of which one is a
    multiple of the other, such as 1/16 and 1/8, the larger has the samples of the smaller.

    `counts` are those that are kept.
    """

    def __init__(self, counts: np.ndarray, share: Fraction):
        self._p, self._q = share.numerator, share.denominator
        ends = np.cumsum(counts)
        self._starts = ends - counts
        self._before = self._kept_before(self._starts)
        self.counts = self._kept_before(ends) - self._before

    def stored(self, shard: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """The number in its shard of the kept sample number `kept` of it."""
        number = -(-(self._before[shard] + kept + 1) * self._q // self._p) - 1
        return number - self._starts[shard]

    def kept(self, shard: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """The inverse of `stored`; -1 for a sample that is not kept."""
        number = self._starts[shard] + stored
        before = self._kept_before(number)
        is_kept = self._kept_before(number + 1) > before
        return np.where(is_kept, before - self._before[shard], -1)

    def _kept_before(self, number: np.ndarray) -> np.ndarray:
        return number * self._p // self._q


class Lanes:
    """The order of `counts[s]` samples in shards s, or of the `share` of them (see `_Part`), in `num_lanes`
    lanes, shuffled in blocks of `block` samples. `counts` are then those of the share.

    Costs O(shards) time and memory an epoch (400,000 shards: 0.1 s and 10 MB), O(1) a slot.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        num_lanes: int,
        seed: int,
        block: int = 1 << 14,
        share: Fraction = Fraction(1),
    ):
        self.share, self._part = share, _Part(np.asarray(counts, np.int64), share)
        self.counts = self._part.counts
        self.num_lanes, self.seed, self.block = num_lanes, seed, block
        self.length = int(self.counts.sum()) // num_lanes
        self._blocks = max(1, self.length // block)  # the last one takes the rest
        self._epoch = -1

    def turns(self, per_lane: int) -> int:
        """Steps of an epoch that take `per_lane` samples of every lane."""
        return self.length // per_lane

    def slots(self, epoch: int, position: int, per_lane: int, first: int, count: int) -> Slots:
        """Slots [first, first + count) of the global batch of num_lanes * per_lane that starts at
        `position`."""
        self._prepare(epoch)
        lanes, within = np.divmod(np.arange(first, first + count), per_lane)
        turn = position + within
        block, start, size = self._block_of(turn)
        in_lane = start + shuffled(turn - start, size, self.seed, epoch, 1, lanes, block)
        line_position = lanes * self.length + in_lane
        place, kept = self._place(line_position)
        shard = self._shards[place]
        return Slots(shard, self._part.stored(shard, kept), line_position, epoch)

    def turns_of(self, epoch: int, shard: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Where in their lanes these samples come in an epoch, int64 [n]; -1 for those in no lane.

        The inverse of `slots`: O(shards) an epoch, O(1) a sample.
        """
        self._prepare(epoch)
        place, kept = np.argsort(self._shards)[shard], self._part.kept(shard, index)
        on_line = self._ends[place] - self.counts[shard] + kept
        lanes, in_lane = np.divmod((on_line - self._rotation) % self._ends[-1], self.length)
        block, start, size = self._block_of(in_lane)
        turn = start + unshuffled(in_lane - start, size, self.seed, epoch, 1, lanes, block)
        return np.where((lanes < self.num_lanes) & (kept >= 0), turn, -1)

    def _block_of(self, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number, first turn, size) of the blocks of these places in a lane."""
        block = np.minimum(turn // self.block, self._blocks - 1)
        start = block * self.block
        return block, start, np.where(block == self._blocks - 1, self.length - start, self.block)

    def block_shards(self, epoch: int, position: int, lanes: np.ndarray) -> list[int]:
        """The shards that hold the block around `position` of the given lanes: what the next steps read."""
        self._prepare(epoch)
        block = min(position // self.block, self._blocks - 1)
        start = block * self.block
        stop = self.length if block == self._blocks - 1 else start + self.block
        first = self._place(lanes * self.length + start)[0]
        last = self._place(lanes * self.length + stop - 1)[0]
        last = np.where(last < first, last + len(self.counts), last)  # around the line's end
        places = {
            place for a, b in zip(first.tolist(), last.tolist(), strict=True) for place in range(a, b + 1)
        }
        return [int(self._shards[place % len(self.counts)]) for place in sorted(places)]

    def _place(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in the epoch's row of shards, index in that shard) of positions on the line."""
        on_line = (position + self._rotation) % self._ends[-1]
        place = np.searchsorted(self._ends, on_line, side="right")
        return place, on_line - (self._ends[place] - self.counts[self._shards[place]])

    def _prepare(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards = permutation(len(self.counts), self.seed, epoch, 0)
            self._ends = np.cumsum(self.counts[self._shards])
            self._rotation = int(mix(self.seed, epoch, 3)) % int(self._ends[-1])


@dataclass(frozen=True)
class DataState:
    """Where the data stand before step `step`: all that a resumed run needs, the same on every rank.

    `skipped` are the ranges left out so far, one that begins at `step` included; `manifest` and `checksums`
    the shards' digests without and with checksums.
    """

    step: int
    epoch: int
    position: int
    num_lanes: int
    block: int
    seed: int
    skipped: tuple[tuple[int, int], ...]
    manifest: str
    checksums: str
    shards: int
    samples: int
    fraction: str = "1"

    def to_json(self) -> dict[str, Any]:
        """The state as plain values, for a checkpoint."""
        return asdict(self) | {"skipped": [list(skip) for skip in self.skipped]}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> DataState:
        """The state that `to_json` made plain, or an older one that has a single digest. ValueError for
        anything else."""
        fields = {"checksums": fields.get("manifest"), "fraction": "1"} | fields
        kinds = {"int": int, "str": str}
        found: dict[str, Any] = {
            field.name: json_field(fields, field.name, kinds.get(str(field.type), list))
            for field in dataclass_fields(DataState)
        }
        return DataState(**found | {"skipped": ranges_from_json(found["skipped"])})


def ranges_from_json(values: list[Any]) -> tuple[tuple[int, int], ...]:
    """Ranges of steps. ValueError for anything else."""
    for value in values:
        if not (isinstance(value, list) and [type(number) for number in value] == [int, int]):
            raise ValueError(f"a range of steps is {kind_of(value)}, not a list of two numbers")
    return tuple((first, last) for first, last in values)


class Order:
    """Which samples each optimizer step reads, from a start or a saved state on.

    `skips` are ranges (A, B): after A steps the data jump ahead by B - A, so that the batches which steps A
    to B - 1 (from 0) would have read are left out. Raises ValueError, with the numbers and the fix, if the
    lanes do not fit the global batch, the seed differs from the state's, or a skip lies before it.
    """

    def __init__(
        self,
        lanes: Lanes,
        global_batch: int,
        skips: Sequence[tuple[int, int]] = (),
        state: DataState | None = None,
    ):
        if global_batch % lanes.num_lanes:
            raise ValueError(
                f"the global batch {global_batch} is no multiple of the {lanes.num_lanes} lanes of the "
                f"order; use {max(1, round(global_batch / lanes.num_lanes)) * lanes.num_lanes}, or "
                f"in a new run --data.lanes {math.gcd(global_batch, MAX_LANES)}"
            )
        self.lanes, self.global_batch, self.skips = lanes, global_batch, tuple(skips)
        self.per_lane = global_batch // lanes.num_lanes
        if lanes.turns(self.per_lane) == 0:
            raise ValueError(
                f"the training shards hold {int(lanes.counts.sum())} samples, too few for a "
                f"global batch of {global_batch}"
            )
        self._step, self._epoch, self._position = 0, 0, 0
        self._pending = self.skips
        if state:
            self._continue(state)

    def _continue(self, state: DataState) -> None:
        if str(self.lanes.share) != state.fraction:
            raise ValueError(
                f"the saved order reads {state.fraction} of the samples, this run {self.lanes.share}; this "
                f"cannot change within a run (--data.fraction)"
            )
        mine = (self.lanes.num_lanes, self.lanes.block, self.lanes.seed)
        if mine != (state.num_lanes, state.block, state.seed):
            raise ValueError(
                f"the saved order has {state.num_lanes} lanes, blocks of {state.block} and seed "
                f"{state.seed}, this run {mine[0]}, {mine[1]} and {mine[2]}; they cannot change "
                f"within a run (--data.lanes, --data.shuffle_block, --seed)"
            )
        before = tuple(skip for skip in self.skips if skip[0] < state.step or skip in state.skipped)
        if before != state.skipped:
            raise ValueError(
                f"--data.skip_steps has {before or 'no range'} before step {state.step}, where the run goes "
                f"on; up to there it left out {state.skipped or 'nothing'}; go on from an earlier "
                f"checkpoint, or change it"
            )
        self._step, self._epoch, self._position = state.step, state.epoch, state.position
        self._pending = tuple(skip for skip in self.skips if skip not in state.skipped)

    @property
    def first_step(self) -> int:
        """The first step that this order tells."""
        return self._step

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, position in every lane) where step `step` begins to read."""
        if step < self._step:
            raise ValueError(f"this order begins at step {self._step}, it does not tell step {step}")
        ahead = step - self._step + sum(b - a for a, b in self._pending if a <= step)
        left = (self.lanes.length - self._position) // self.per_lane
        if ahead < left:
            return self._epoch, self._position + ahead * self.per_lane
        epochs, turn = divmod(ahead - left, self.lanes.turns(self.per_lane))
        return self._epoch + 1 + epochs, turn * self.per_lane

    def slots(self, step: int, first: int, count: int) -> Slots:
        """Slots [first, first + count) of the global batch of optimizer step `step`."""
        return self.lanes.slots(*self.place(step), self.per_lane, first, count)

    def steps_of(self, shard: np.ndarray, index: np.ndarray, stop: int) -> list[tuple[int, ...]]:
        """The steps before `stop`, of those that this order tells, in which each of these samples is read: at
        most one an epoch. No step is walked through: O(shards) an epoch, O(1) a sample and epoch."""
        found: list[list[int]] = [[] for _ in shard]
        if stop <= self._step:
            return [() for _ in shard]
        for epoch in range(self._epoch, self.place(stop - 1)[0] + 1):
            steps = self._steps_of_epoch(epoch, shard, index)
            for number in np.flatnonzero((steps >= 0) & (steps < stop)).tolist():
                found[number].append(int(steps[number]))
        return [tuple(steps) for steps in found]

    def _steps_of_epoch(self, epoch: int, shard: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The step of an epoch that reads each of these samples, int64 [n]; -1 if none does."""
        turns, start = self.lanes.turns(self.per_lane), self._position
        left = (self.lanes.length - start) // self.per_lane
        before, count = 0, left
        if epoch > self._epoch:
            before, count, start = left + (epoch - self._epoch - 1) * turns, turns, 0
        turn = self.lanes.turns_of(epoch, shard, index)
        number = (turn - start) // self.per_lane
        is_read = (turn >= start) & (number < count)
        step = self._step + before + number
        for first, last in sorted(self._pending):
            is_read &= (step < first) | (step >= last)
            step = np.where(step >= last, step - (last - first), step)
        return np.where(is_read, step, -1)

    def passes(self, step: int) -> float:
        """Passes over the data before `step`."""
        epoch, position = self.place(step)
        return epoch + position / self.lanes.length
