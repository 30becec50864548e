"""Tokens of high norm: where they are, and whether a map points at them."""

from __future__ import annotations

import torch

from megavit.explain.tokens import high_norms
from tests.explain.test_maps import GRID, photos
from tests.model.test_observe import build


def test_tokens_of_high_norm_are_found_where_they_are() -> None:
    """Catches registers among the patches, rows for columns, and norms of another block."""
    model = build(num_registers=2).eval()
    assert high_norms(model, photos(2)).by_block.abs().max() == 0
    with torch.no_grad():  # a register is no patch
        model.prefix[0] = 1000
    assert high_norms(model, photos(2)).by_block.abs().max() == 0
    images = photos(2)
    images[1, :, 4:8, 12:16] = 200.0  # row 1, column 3
    found = high_norms(model, images)
    assert found.by_block.shape == (4, 2)
    assert found.by_block[0].tolist() == [0, torch.tensor(1 / 15).item()]
    expected = torch.zeros(2, *GRID, dtype=torch.bool)
    expected[1, 1, 3] = True
    assert torch.equal(found.is_high, expected)
    values = expected.float() + torch.rand(2, *GRID) / 2
    assert found.share_of_top(values).tolist() == [0, 1] and found.share_of_top(-values).tolist() == [0, 0]
