"""Shares of the rows, the held-out tenth, and which sets a probe can be trained on."""

from __future__ import annotations

import numpy as np
import pytest

from megavit.evaluate.protocols import rows as rows_module
from megavit.evaluate.protocols.rows import Share, held_out_tenth, single_labels
from megavit.parallel.mesh import Mesh
from tests.evaluate.protocols.memory import digits, features, image_set


@pytest.mark.parametrize("held_bytes", [1 << 30, 1000])
def test_shares_cover_every_row_once(held_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that two ranks of a TP group both count, lost rows of short pieces, a stream that differs
    from what is held, and chunks above the bound."""
    monkeypatch.setattr(rows_module, "_HELD_BYTES", held_bytes)
    monkeypatch.setattr(rows_module, "_CHUNK_NUMBERS", 70)
    values = np.arange(203 * 2, dtype=np.float32).reshape(203, 2)
    images, wanted = image_set([0] * 203), np.arange(0, 203, 3)
    seen = []
    for dp_rank in range(3):
        for tp_rank in range(2):
            mesh = Mesh(tp_size=2, tp_rank=tp_rank, dp_size=3, dp_rank=dp_rank)
            share = Share(features(images, values, mesh, bad=[6, 7]), wanted[wanted != 6])
            for _ in range(2):  # a second pass is the same
                chunks = list(share.chunks(10))
            for piece in chunks:
                assert len(piece.rows) <= 7
                np.testing.assert_array_equal(piece.values.numpy(), values[piece.rows])
                seen += piece.rows.tolist()
    assert sorted(seen) == [row for row in range(0, 203, 3) if row != 6]


def test_the_tenth_is_of_every_class_and_of_readable_images() -> None:
    """Catches a held-out part that overlaps, that takes bad images, or that misses whole classes."""
    labels = np.repeat(np.arange(10), [100, 90, 55, 10, 10, 10, 10, 5, 4, 1])
    train = features(image_set(labels), np.zeros((len(labels), 2)), bad=[0, 50])
    kept, held = held_out_tenth(train)
    assert len(held) == (len(labels) - 2) // 10
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), train.usable)
    tenths = np.bincount(labels[train.usable], minlength=10) / 10
    assert (np.abs(np.bincount(labels[held], minlength=10) - tenths) < 1).all()
    assert (held_out_tenth(train, 1)[1] != held).any()
    with pytest.raises(ValueError, match="9 images"):
        held_out_tenth(features(image_set([0] * 9), np.zeros((9, 2))))


def test_sets_that_no_probe_can_learn_are_refused() -> None:
    """Catches a probe that silently takes the first of several labels, or -1 for a class."""
    values = np.zeros((3, 2))
    assert single_labels(features(image_set([1, 2, 0]), values)).tolist() == [1, 2, 0]
    assert single_labels(features(image_set([1, [], 0]), values, bad=[1])).tolist() == [1, -1, 0]
    for labels, right in (([1, [], 2], "one"), ([1, [1, 2], 2], "one"), ([1, 2, 0], "all")):
        with pytest.raises(ValueError, match="one class an image"):
            single_labels(features(image_set(labels, right=right), values))
    with pytest.raises(ValueError, match="none of 3"):
        single_labels(features(image_set([1, 2, 0]), values, bad=[0, 1, 2]))


def test_digits_are_split_as_the_demo_splits_them() -> None:
    """Catches a test image among the training images of the tests below."""
    train, test = digits()
    assert (len(train.set), len(test.set)) == (1437, 360)
