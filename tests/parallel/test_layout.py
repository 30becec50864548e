"""Cutting logical tensors into shards and joining them again."""

from __future__ import annotations

import pytest
import torch

from megavit.parallel.layout import Layout, Piece

LAYOUTS = [
    Layout((6, 4)),
    Layout((8, 5), 0),
    Layout((12, 3), 0, (4, 8)),
    Layout((5, 8), 1),
    Layout((7, 3), 0),  # padded: 7 classes
    Layout((2,), 0),  # fewer entries than ranks
]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_join_inverts_take(layout: Layout, tp_size: int) -> None:
    """Catches rows lost, doubled or reordered between shards, also in fused and padded tensors."""
    logical = torch.arange(1.0, 1 + torch.Size(layout.shape).numel()).view(layout.shape)
    shards = [layout.take(logical, rank, tp_size) for rank in range(tp_size)]
    assert all(tuple(shard.shape) == layout.local_shape(tp_size) for shard in shards)
    assert torch.equal(layout.join(shards), logical)


def test_fused_parts_are_cut_one_by_one() -> None:
    """Catches cutting [q; k; v] as one block, which would give rank 0 all of q and half of k."""
    assert Layout((12, 3), 0, (4, 8)).pieces(1, 2) == [Piece(2, 0, 2), Piece(8, 2, 4)]


def test_padding_is_zero_and_last() -> None:
    """Catches garbage in padded classifier rows, which weight decay and norms would see."""
    layout = Layout((5, 2), 0)
    last = layout.take(torch.ones(5, 2), 3, 4)  # shares of 2: rows 0-1, 2-3, 4, none
    assert torch.equal(last, torch.zeros(2, 2))
    assert torch.equal(layout.take(torch.ones(5, 2), 2, 4), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
