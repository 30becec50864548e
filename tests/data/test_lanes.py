"""The order of samples."""

from __future__ import annotations

import numpy as np
import pytest

from megavit.data.lanes import Lanes, Slots, mix, permutation, uniforms

COUNTS = [20, 200, 33, 71, 150, 9, 64, 41]


def places(slots: Slots) -> list[tuple[int, int]]:
    return list(zip(slots.shard.tolist(), slots.index.tolist(), strict=True))


def epoch_of_samples(lanes: Lanes, epoch: int) -> list[tuple[int, int]]:
    first = epoch * lanes.steps_per_epoch
    steps = [lanes.slots(step, 0, lanes.global_batch) for step in range(first, first + lanes.steps_per_epoch)]
    assert {slots.epoch for slots in steps} == {epoch}
    return [place for slots in steps for place in places(slots)]


@pytest.mark.parametrize("global_batch", [1, 7, 24, 64])
def test_an_epoch_reads_samples_at_most_once_and_nearly_all(global_batch: int) -> None:
    """Catches samples read twice, indices beyond a shard, and more than a batch and a lane's rest left
    out."""
    lanes = Lanes(COUNTS, global_batch, seed=1)
    for epoch in range(2):
        seen = epoch_of_samples(lanes, epoch)
        assert len(set(seen)) == len(seen) > sum(COUNTS) - global_batch - lanes.num_lanes
        assert all(0 <= index < COUNTS[shard] for shard, index in seen)


def test_ranks_share_out_the_global_batch() -> None:
    """Catches an order that depends on how many ranks ask."""
    lanes = Lanes(COUNTS, 48, seed=3)
    for step in (0, 5, 11, 30):
        whole = lanes.slots(step, 0, 48)
        keys = list(zip(places(whole), whole.position.tolist(), strict=True))
        for ranks in (2, 3, 4, 16):
            share = 48 // ranks
            parts = [Lanes(COUNTS, 48, seed=3).slots(step, rank * share, share) for rank in range(ranks)]
            again = [
                pair for part in parts for pair in zip(places(part), part.position.tolist(), strict=True)
            ]
            assert again == keys


def test_epochs_and_seeds_differ() -> None:
    """Catches an epoch or seed that is not part of the key."""
    lanes = Lanes(COUNTS, 24, seed=0)
    first, second = epoch_of_samples(lanes, 0), epoch_of_samples(lanes, 1)
    assert first != second
    assert epoch_of_samples(Lanes(COUNTS, 24, seed=1), 0) != first
    # Positions of the same sample in two epochs are unrelated.
    place = {sample: i for i, sample in enumerate(first)}
    pairs = np.array([(place[s], i) for i, s in enumerate(second) if s in place])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.15


def test_left_out_samples_change_with_the_epoch() -> None:
    """Catches samples at the end of a single shard that are never seen."""
    lanes = Lanes([80], 64, seed=0)
    assert len({index for epoch in range(20) for _, index in epoch_of_samples(lanes, epoch)}) == 80


def test_too_few_samples_name_both_numbers() -> None:
    """Catches a division by zero deep in the loader."""
    with pytest.raises(ValueError, match=r"588 samples.*global batch of 1024"):
        Lanes(COUNTS, 1024, seed=0)


def test_hash_is_pinned() -> None:
    """Catches a change of the hash: every run's order and augmentation would change on resuming."""
    assert int(mix(1, 2, 3)) == int(mix(1, 2, 3)) != int(mix(3, 2, 1))
    assert int(mix(1, 2, 3)) == PINNED
    values = uniforms(100_000, 7, 8)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.std() - 12**-0.5) < 0.005
    assert sorted(permutation(1000, 5)) == list(range(1000))


PINNED = 10530651154998451608
