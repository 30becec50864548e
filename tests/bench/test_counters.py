"""The bench's counters against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megavit.bench.counters import BlockMatmuls, forward_flops, memory_of_step
from megavit.bench.model import compare
from megavit.bench.peers import CONTESTANTS, choose, parse_shape
from megavit.model.count import forward_flops as counted

TINY, BATCH = parse_shape("64x2x2x8", image_size=56, patch_size=14, num_classes=10)


@pytest.mark.parametrize("name", ["megavit", "megavit-selective", "megavit-full"])
def test_flops_are_those_of_the_formula(name: str) -> None:
    """Catches a counter that does not know one of our matmuls, or that counts recomputation."""
    model = CONTESTANTS[name].build(TINY)
    assert forward_flops(model, torch.rand(BATCH, 3, 56, 56)) == BATCH * counted(TINY)


def test_memory_of_two_linears_by_hand() -> None:
    """Catches activations counted twice or not at all, and weights or gradients counted as activations."""
    rows, dim, hidden = 64, 128, 512
    model = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
    x = torch.randn(rows, dim)
    memory = memory_of_step(lambda: model(x).square().sum(), lambda: model.zero_grad(set_to_none=False))
    kept = 2 * rows * hidden + rows * dim  # before and after GELU, and the output, which the square keeps
    assert kept * 4 <= memory.kept <= kept * 4 + 512  # and the loss
    # Besides, when the second weight's gradient is made: the gradient of the output.
    assert memory.peak >= memory.kept + 4 * rows * dim
    assert memory.peak <= memory.kept + 4 * (2 * rows * hidden + 2 * hidden * dim)


def test_activations_kept_by_our_blocks() -> None:
    """Catches memory in wrong units: 16, 9 and 1 D a token and block (and 5 kB of random state, which counts
    at this size); and rows that lack the reference, which is the first model where timm's is left out."""
    contestants, _ = choose(["megavit", "megavit-selective", "megavit-full"])
    rows = list(compare(TINY, BATCH, contestants, count=1))
    assert [int(row["activations_kept_D"]) for row in rows] == [16, 9, 1]
    assert all(row["activations_kept_D"] % 1 < 0.3 for row in rows)
    assert {row["ratio_to"] for row in rows} == {"megavit"}
    assert rows[0]["ratio_low"] == rows[0]["ratio_median"] == rows[0]["ratio_high"] == 1
    assert all(row["images_per_s"] > 0 and row["of_ceiling"] > 0 for row in rows)


def test_block_matmuls_count_what_they_do() -> None:
    """Catches a ceiling from FLOPs that were not done."""
    from torch.utils.flop_counter import FlopCounterMode

    matmuls = BlockMatmuls(TINY, BATCH, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        matmuls()
    tokens = BATCH * 16
    assert counter.get_total_flops() == matmuls.flops == 2 * 6 * tokens * 12 * 64**2
