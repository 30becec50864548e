"""The order of samples."""

from __future__ import annotations

import math
import time
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from megavit.data.lanes import DataState, Lanes, Order, Slots, mix, permutation, shuffled, uniforms

COUNTS = [20, 200, 33, 71, 150, 9, 64, 41]


def places(slots: Slots) -> list[tuple[int, int]]:
    return list(zip(slots.shard.tolist(), slots.index.tolist(), strict=True))


def order_of(
    global_batch: int,
    seed: int = 0,
    counts: list[int] = COUNTS,
    lanes: int = 0,
    block: int = 16,
    **options: Any,
) -> Order:
    num_lanes = lanes or math.gcd(global_batch, 1024)
    return Order(Lanes(counts, num_lanes, seed, block), global_batch, **options)


def steps_per_epoch(order: Order) -> int:
    return order.lanes.turns(order.per_lane)


def epoch_of_samples(order: Order, epoch: int) -> list[tuple[int, int]]:
    steps = steps_per_epoch(order)
    slots = [order.slots(epoch * steps + turn, 0, order.global_batch) for turn in range(steps)]
    assert {found.epoch for found in slots} == {epoch}
    return [place for found in slots for place in places(found)]


@pytest.mark.parametrize("block", [1, 16, 10_000])
@pytest.mark.parametrize("global_batch", [1, 7, 24, 64])
def test_an_epoch_reads_samples_at_most_once_and_nearly_all(global_batch: int, block: int) -> None:
    """Catches samples read twice, indices beyond a shard, and more than a batch and a lane's rest left
    out."""
    order = order_of(global_batch, seed=1, block=block)
    for epoch in range(2):
        seen = epoch_of_samples(order, epoch)
        assert len(set(seen)) == len(seen) > sum(COUNTS) - global_batch - order.lanes.num_lanes
        assert all(0 <= index < COUNTS[shard] for shard, index in seen)


@pytest.mark.parametrize("share", [Fraction(1, 16), Fraction(1, 8), Fraction(2, 3), Fraction(1)])
def test_a_share_of_the_samples_is_the_same_in_every_order(share: Fraction) -> None:
    """Catches shares that depend on the seed or the batch, that come from the beginning of each shard, or
    that do not contain the smaller ones, and samples that cannot be found again."""

    def seen(share: Fraction, seed: int, global_batch: int) -> set[tuple[int, int]]:
        order = Order(Lanes(COUNTS, 1, seed, 16, share), global_batch)
        epoch = epoch_of_samples(order, seed)
        shard, index = np.array(epoch).T
        steps = order.steps_of(shard, index, (seed + 1) * steps_per_epoch(order))
        first = seed * steps_per_epoch(order)
        assert [found[-1] - first for found in steps] == [at // global_batch for at in range(len(epoch))]
        return set(epoch)

    mine = seen(share, 0, 1)
    starts = np.cumsum(COUNTS) - COUNTS
    numbers = sorted(int(starts[shard] + index) for shard, index in mine)
    assert len(numbers) == int(sum(COUNTS) * share)
    assert set(np.diff(numbers)) <= {math.floor(1 / share), math.ceil(1 / share)}
    assert seen(share, 3, 4) <= mine == seen(share, 5, 1)
    assert seen(Fraction(1, 16), 0, 1) <= seen(Fraction(1, 8), 0, 1)
    whole = Lanes(COUNTS, 1, 0, 16)
    left_out = [(s, i) for s, count in enumerate(COUNTS) for i in range(count) if (s, i) not in mine]
    if left_out:
        shard, index = np.array(left_out).T
        assert (Lanes(COUNTS, 1, 0, 16, share).turns_of(0, shard, index) == -1).all()
    assert (whole.turns_of(0, *np.array(list(mine)).T) >= 0).all()


def test_ranks_share_out_the_global_batch() -> None:
    """Catches an order that depends on how many ranks ask."""
    for step in (0, 5, 11, 30):
        whole = order_of(48, 3).slots(step, 0, 48)
        keys = list(zip(places(whole), whole.position.tolist(), strict=True))
        for ranks in (2, 3, 4, 16):
            share = 48 // ranks
            parts = [order_of(48, 3).slots(step, rank * share, share) for rank in range(ranks)]
            again = [
                pair for part in parts for pair in zip(places(part), part.position.tolist(), strict=True)
            ]
            assert again == keys


def test_epochs_and_seeds_differ() -> None:
    """Catches an epoch or seed that is not part of the key."""
    first, second = epoch_of_samples(order_of(24), 0), epoch_of_samples(order_of(24), 1)
    assert first != second
    assert epoch_of_samples(order_of(24, seed=1), 0) != first


def test_distance_between_two_epochs_is_that_of_a_full_shuffle() -> None:
    """Catches samples that come back at about the same time each epoch: |x - y| of two independent uniform
    positions has mean 1/3 and standard deviation 1/sqrt(18), and neighbours of one epoch must be apart in the
    next."""
    rng = np.random.default_rng(0)
    order = order_of(64, counts=rng.integers(80, 120, 400).tolist(), block=128)
    first, second = epoch_of_samples(order, 0), epoch_of_samples(order, 1)
    where = {sample: i for i, sample in enumerate(second)}
    kept = np.array([(i, where[s]) for i, s in enumerate(first) if s in where]) / len(first)
    distance = np.abs(kept[:, 0] - kept[:, 1])
    assert len(kept) > 0.98 * len(first)
    assert abs(distance.mean() - 1 / 3) < 0.02 and abs(distance.std() - 18**-0.5) < 0.02
    assert abs(np.corrcoef(kept.T)[0, 1]) < 0.05
    # Samples of one batch come from all over the data, and meet in no later batch more often than by chance.
    assert len({shard for shard, _ in first[:64]}) > 40
    again = [len({where[s] // 64 for s in first[b : b + 64] if s in where}) for b in range(0, 6400, 64)]
    assert np.mean(again) > 58  # 64 balls in 620 boxes fill 60.9


def test_left_out_samples_change_with_the_epoch() -> None:
    """Catches samples at the end of a single shard that are never seen."""
    order = order_of(64, counts=[80])
    assert len({index for epoch in range(20) for _, index in epoch_of_samples(order, epoch)}) == 80


def test_too_few_samples_name_both_numbers() -> None:
    """Catches a division by zero deep in the loader."""
    with pytest.raises(ValueError, match=r"588 samples.*global batch of 1024"):
        order_of(1024)


def test_hash_is_pinned() -> None:
    """Catches a change of the hash: every run's order and augmentation would change on resuming."""
    assert int(mix(1, 2, 3)) == int(mix(1, 2, 3)) != int(mix(3, 2, 1))
    assert int(mix(1, 2, 3)) == PINNED
    values = uniforms(100_000, 7, 8)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.std() - 12**-0.5) < 0.005
    assert sorted(permutation(1000, 5)) == list(range(1000))


PINNED = 10530651154998451608


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 100, 16_384, 20_001])
def test_shuffle_is_a_permutation(count: int) -> None:
    """Catches a sample read twice within a block."""
    found = shuffled(np.arange(count), np.full(count, count), 3, 4)
    assert sorted(found.tolist()) == list(range(count))
    if count > 100:
        assert abs(np.corrcoef(found, np.arange(count))[0, 1]) < 0.05
        assert not np.array_equal(found, shuffled(np.arange(count), np.full(count, count), 3, 5))


def test_small_shuffles_are_even() -> None:
    """Catches a network that reaches some permutations of few samples only: chi-square of the six of
    three."""
    keys = np.arange(60_000)
    rows = np.stack([shuffled(np.full(60_000, i), np.full(60_000, 3), keys) for i in range(3)])
    counts = np.unique(rows, axis=1, return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 10_000) ** 2 / 10_000).sum() < 20.5  # p = 0.001


def samples(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    return [
        place for step in range(first, last) for place in places(order.slots(step, 0, order.global_batch))
    ]


def state(order: Order, step: int) -> DataState:
    epoch, position = order.place(step)
    skipped = tuple(skip for skip in order.skips if skip[0] <= step)
    lanes = order.lanes
    return DataState(step, epoch, position, lanes.num_lanes, lanes.block, lanes.seed, skipped, "", "", 0, 0)


@pytest.mark.parametrize("step", [0, 5, 23, 24, 25, 60])
def test_a_saved_state_continues_exactly(step: int) -> None:
    """Catches an order that counts from the start of the run, or loses its place at an epoch's end (24
    steps)."""
    order = order_of(24)
    again = order_of(24, state=state(order, step))
    assert samples(again, step, step + 40) == samples(order, step, step + 40)


def test_the_global_batch_may_change_to_a_multiple_of_the_lanes() -> None:
    """Catches samples repeated or left out in an epoch in which the batch grows."""
    small = order_of(24, lanes=8)
    large = order_of(48, lanes=8, state=state(small, 5))
    steps = (large.lanes.length - large.place(5)[1]) // large.per_lane
    seen = samples(small, 0, 5) + samples(large, 5, 5 + steps)
    assert large.place(5 + steps) == (1, 0)
    assert len(set(seen)) == len(seen) > sum(COUNTS) - 48 - 8
    with pytest.raises(ValueError, match=r"global batch 20 is no multiple of the 8 lanes.*use 16"):
        order_of(20, lanes=8)


def test_skipped_steps_are_left_out_and_nothing_else() -> None:
    """Catches a range that is off by one, repeats data, or is forgotten or applied again on resuming."""
    plain, skipping = order_of(24), order_of(24, skips=((3, 7), (10, 12)))
    whole = [samples(plain, step, step + 1) for step in range(40)]
    assert [samples(skipping, step, step + 1) for step in range(34)] == whole[:3] + whole[7:14] + whole[16:40]
    for step in (2, 3, 8, 11, 20):
        again = order_of(24, skips=((3, 7), (10, 12)), state=state(skipping, step))
        assert samples(again, step, 30) == samples(skipping, step, 30)
    late = order_of(24, skips=((8, 10),), state=state(plain, 8))  # a rollback to just before the trouble
    assert samples(late, 8, 10) == samples(plain, 10, 12)
    with pytest.raises(ValueError, match=r"skip_steps has \(\(3, 7\),\) before step 8.*left out nothing"):
        order_of(24, skips=((3, 7),), state=state(plain, 8))


def test_what_is_fixed_in_a_run_cannot_change() -> None:
    """Catches another seed or number of lanes on resuming, which would repeat samples in silence."""
    for other in (order_of(24, seed=1), order_of(24, lanes=12), order_of(24, block=32)):
        with pytest.raises(ValueError, match="cannot change within a run"):
            Order(other.lanes, 24, state=state(order_of(24), 4))
    fewer = Lanes(COUNTS, 24, 0, 16, Fraction(1, 2))
    with pytest.raises(ValueError, match=r"reads 1 of the samples, this run 1/2.*--data\.fraction"):
        Order(fewer, 24, state=state(order_of(24), 4))


def test_a_block_names_the_shards_that_it_reads() -> None:
    """Catches a prefetch of other shards than those that come."""
    order = order_of(8, block=16)
    lanes = order.lanes
    for epoch in (0, 1):
        for start in range(0, lanes.length - 16, 16):
            slots = [lanes.slots(epoch, position, 1, 0, 8) for position in range(start, start + 16)]
            read = {int(shard) for found in slots for shard in found.shard}
            assert set(lanes.block_shards(epoch, start, np.arange(8))) == read


def test_four_billion_samples() -> None:
    """Catches an order that holds a number per sample: 400,000 shards and 4e9 samples need 100 MB at most,
    and the first batch in mid-epoch must not wait for what came before."""
    counts = np.random.default_rng(0).integers(9_000, 11_000, 400_000)
    tracemalloc.start()
    try:
        order = Order(Lanes(counts, 1024, seed=0), 65_536)
        started = time.process_time()
        slots = order.slots(30_000, 0, 512)
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert order.place(30_000)[1] > 0 and len(np.unique(slots.shard)) > 4
    assert peak < 100e6
    assert seconds < 1.0  # measured 0.1


@pytest.mark.parametrize(
    ("global_batch", "block", "skips", "begin"),
    [
        (24, 16, (), 0),
        (7, 1, (), 0),
        (48, 10_000, ((3, 7), (10, 12)), 0),
        (24, 16, ((0, 2), (5, 90), (91, 92)), 0),  # a whole epoch and more is left out
        (24, 16, ((3, 7), (40, 41)), 30),
        (24, 16, ((30, 33),), 30),
    ],
)
def test_steps_of_samples_are_those_that_walking_finds(
    global_batch: int, block: int, skips: tuple[tuple[int, int], ...], begin: int
) -> None:
    """Catches an inverse permutation with its rounds in the wrong order, samples at the end of a lane or of
    an epoch that are said to be read, data left out, a run that begins within an epoch, and steps past the
    end."""
    order = order_of(global_batch, seed=3, block=block, skips=skips)
    if begin:
        order = order_of(global_batch, seed=3, block=block, skips=skips, state=state(order, begin))
    stop = begin + 3 * steps_per_epoch(order) + 2
    walked: dict[tuple[int, int], list[int]] = {}
    for step in range(begin, stop):
        for place in places(order.slots(step, 0, global_batch)):
            walked.setdefault(place, []).append(step)
    samples = [(shard, index) for shard, count in enumerate(COUNTS) for index in range(count)]
    shard, index = np.array(samples).T
    found = order.steps_of(shard, index, stop)
    assert found == [tuple(walked.get(sample, ())) for sample in samples]
    assert max(map(len, found)) > 2 and min(map(len, found)) < max(map(len, found))
    assert order.steps_of(shard[:2], index[:2], begin) == [(), ()]


def test_steps_of_a_sample_are_found_in_a_run_too_long_to_walk() -> None:
    """Catches a search through the steps, which would take hours: three billion samples, the fourth epoch."""
    order = Order(Lanes([10_000] * 300_000, 1024, 0), 65_536)
    slots = order.slots(160_000, 17, 3)
    found = order.steps_of(slots.shard, slots.index, 160_001)
    assert [steps[-1] for steps in found] == [160_000] * 3


def test_steps_after_the_global_batch_has_changed() -> None:
    """Catches the first epoch of a larger batch counted from the epoch's start, not from where it goes on."""
    large = order_of(48, lanes=8, state=state(order_of(24, lanes=8), 5))
    for step in (5, 9, 30):
        slots = large.slots(step, 0, 48)
        assert all(step in steps for steps in large.steps_of(slots.shard, slots.index, 40))
