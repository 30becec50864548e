"""The order of training samples: "lanes", a pure function of (seed, step, global batch).

The shards of an epoch, permuted, form one line of samples, rotated by a random amount and cut into L equal
lanes; what does not fill a lane or a step is left out, other samples each epoch. Slot j of a global batch
reads lane j // m at consecutive positions (m = global_batch / L), and a lane's positions are permuted among
themselves. So which samples make up a step does not depend on ranks, workers or what was read before, and any
step can be computed at once. All arithmetic is on 64-bit integers (splitmix64), tied to no library's random
stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MAX_LANES = 1024
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


@dataclass(frozen=True)
class Slots:
    """Samples of a global batch, int64 [n] each: where they lie, and the key (epoch, position) of their
    augmentation."""

    shard: np.ndarray
    index: np.ndarray
    position: np.ndarray
    epoch: int


class Lanes:
    """The order of `counts[s]` samples in shards s, for global batches of one size.

    Raises ValueError if the data hold fewer samples than one global batch. Costs O(shards) memory an epoch
    and O(lane length) for each lane touched.
    """

    def __init__(self, counts: Sequence[int], global_batch: int, seed: int):
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.global_batch = seed, global_batch
        self.num_lanes = math.gcd(global_batch, _MAX_LANES)
        self.per_lane = global_batch // self.num_lanes
        self.lane_length = int(self.counts.sum()) // self.num_lanes
        self.steps_per_epoch = self.lane_length // self.per_lane
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training shards hold {int(self.counts.sum())} samples, too few for a "
                f"global batch of {global_batch}"
            )
        self._epoch = -1

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def slots(self, step: int, first: int, count: int) -> Slots:
        """Slots [first, first + count) of the global batch of optimizer step `step`."""
        epoch = self.epoch_of(step)
        self._prepare(epoch)
        lanes, within = np.divmod(np.arange(first, first + count), self.per_lane)
        turns = (step % self.steps_per_epoch) * self.per_lane + within
        in_lane = [
            self._lane_order(lane)[turn] for lane, turn in zip(lanes.tolist(), turns.tolist(), strict=True)
        ]
        position = lanes * self.lane_length + np.array(in_lane, np.int64)
        on_line = (position + self._rotation) % self._ends[-1]
        place = np.searchsorted(self._ends, on_line, side="right")
        starts = self._ends - self.counts[self._shards]
        return Slots(self._shards[place], on_line - starts[place], position, epoch)

    def _prepare(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards = permutation(len(self.counts), self.seed, epoch, 0)
            self._ends = np.cumsum(self.counts[self._shards])
            self._rotation = int(mix(self.seed, epoch, 3)) % int(self._ends[-1])
            self._orders: dict[int, np.ndarray] = {}

    def _lane_order(self, lane: int) -> np.ndarray:
        if lane not in self._orders:
            self._orders[lane] = permutation(self.lane_length, self.seed, self._epoch, 1, lane)
        return self._orders[lane]
