"""Cutting logical tensors into shards, and shards into boxes."""

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
@pytest.mark.parametrize("dp_size", [1, 2, 3, 7])
def test_boxes_of_all_slices_are_the_logical_tensor(layout: Layout, tp_size: int, dp_size: int) -> None:
    """Catches elements lost, doubled or misplaced where ZeRO cuts a shard, in fused and padded ones too."""
    logical = torch.arange(1.0, 1 + torch.Size(layout.shape).numel()).view(layout.shape)
    rebuilt = torch.zeros(layout.matrix_shape)
    for tp_rank in range(tp_size if layout.dim is not None else 1):
        shard = layout.take(logical, tp_rank, tp_size)
        assert tuple(shard.shape) == layout.local_shape(tp_size)
        share = -(-shard.numel() // dp_size)
        for start in range(0, shard.numel(), share):
            piece = shard.flatten()[start : start + share]
            for box in layout.boxes(tp_rank, tp_size, start, start + len(piece)):
                values = piece[box.offset : box.offset + box.rows * box.columns]
                place = rebuilt[box.row : box.row + box.rows, box.column : box.column + box.columns]
                assert not place.any(), "written twice"
                place.copy_(values.view(box.rows, box.columns))
    assert torch.equal(rebuilt.view(layout.shape), logical)


def test_fused_parts_are_cut_one_by_one() -> None:
    """Catches cutting [q; k; v] as one block, which would give rank 0 all of q and half of k."""
    assert Layout((12, 3), 0, (4, 8)).pieces(1, 2) == [Piece(2, 0, 2), Piece(8, 2, 4)]


def test_padding_is_zero_and_last() -> None:
    """Catches garbage in padded classifier rows, which weight decay and norms would see."""
    layout = Layout((5, 2), 0)
    last = layout.take(torch.ones(5, 2), 3, 4)  # shares of 2: rows 0-1, 2-3, 4, none
    assert torch.equal(last, torch.zeros(2, 2))
    assert torch.equal(layout.take(torch.ones(5, 2), 2, 4), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
