"""The bench's counters against counts by hand, and its arithmetic."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from megavit.bench import gpu
from megavit.bench.counters import BlockMatmuls, forward_flops, memory_of_step
from megavit.bench.model import compare
from megavit.bench.peers import CONTESTANTS, Shape, choose
from megavit.bench.rounds import require_matplotlib, rounds, speed_ratio
from megavit.model.count import forward_flops as counted
from megavit.model.vit import MegaVit

TINY = Shape(dim=64, depth=2, heads=2, batch=8, image_size=56, num_classes=10)


def tiny_megavit(recompute: str) -> MegaVit:
    model = CONTESTANTS["megavit" if recompute == "none" else f"megavit-{recompute}"].build(TINY)
    assert isinstance(model, MegaVit)
    return model


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flops_are_those_of_the_formula(recompute: str) -> None:
    """Catches a counter that does not know one of our matmuls, or that counts recomputation."""
    model = tiny_megavit(recompute)
    images = torch.rand(TINY.batch, 3, 56, 56)
    assert forward_flops(model, images) == TINY.batch * counted(model.config)


def test_memory_of_two_linears_by_hand() -> None:
    """Catches activations counted twice or not at all, and weights or gradients counted as activations."""
    rows, dim, hidden = 64, 128, 512
    model = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
    x = torch.randn(rows, dim)
    memory = memory_of_step(lambda: model(x).square().sum(), lambda: model.zero_grad(set_to_none=False))
    held = 2 * rows * hidden + rows * dim  # before and after GELU, and the output, which the square keeps
    assert held * 4 <= memory.held <= held * 4 + 512  # and the loss
    # Besides, when the second weight's gradient is made: the gradient of the output.
    assert memory.peak >= memory.held + 4 * rows * dim
    assert memory.peak <= memory.held + 4 * (2 * rows * hidden + 2 * hidden * dim)


@pytest.mark.parametrize(
    ("recompute", "low", "high"), [("none", 16, 16.2), ("selective", 9, 9.3), ("full", 1, 1.2)]
)
def test_held_memory_of_our_blocks(recompute: str, low: float, high: float) -> None:
    """Catches memory in wrong units: 16, 9 and 1 D a token and block (and 5 kB of random state, which counts
    at this size)."""
    names = ["megavit" if recompute == "none" else f"megavit-{recompute}"]
    (row,) = compare(TINY, choose(names)[0], count=1)
    assert low <= row.held <= high
    assert row.x_reference.median == 1 and row.images_per_s > 0 and row.of_ceiling.median > 0


def test_block_matmuls_count_what_they_do() -> None:
    """Catches a ceiling from FLOPs that were not done."""
    from torch.utils.flop_counter import FlopCounterMode

    matmuls = BlockMatmuls(8, 16, 64, repeats=3)
    with FlopCounterMode(display=False) as counter:
        matmuls()
    assert counter.get_total_flops() == matmuls.flops == 3 * 6 * 8 * 12 * 16**2


def test_ratios_are_taken_within_a_round() -> None:
    """Catches a ratio of medians, which a busy minute would move, and a first round that is counted."""
    times = iter([0, 99, 0, 1, 1, 3, 0, 2, 2, 4, 0, 3, 3, 3.5])
    seconds = rounds({"a": lambda: None, "b": lambda: None}, 3, lambda: next(times))
    assert seconds == {"a": [2, 2, 0.5], "b": [1, 2, 3]}  # the order turns: b is first in rounds 1 and 3
    ratio = speed_ratio([4, 1, 10], [2, 1, 20])
    assert (ratio.median, ratio.low, ratio.high) == (1, 0.5, 2)


def test_wrong_names_and_shapes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a misspelt model that is left out silently, and a missing package that ends the comparison."""
    with pytest.raises(ValueError, match="timm-paralel.*did you mean 'timm-parallel'.*known: megavit"):
        choose(["timm-paralel"])
    for text in ("384x6x6", "384x6x6xb", "384x6x0x8", "65x2x2x2"):
        with pytest.raises(ValueError, match="384x6x6x8|must divide"):
            Shape.parse(text, 224, 14, 1000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else name)
    chosen, left_out = choose(["hf-vit", "megavit"])
    assert list(chosen) == ["megavit"]
    assert "hf-vit needs transformers" in left_out[0] and "pip install 'megavit[peers]'" in left_out[0]


def test_plot_without_matplotlib_is_an_early_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half an hour of measuring before an import error."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'megavit\[plot\]'"):
        require_matplotlib()


def test_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one case too large for the GPU that ends all others."""

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_run", too_large)
    size = gpu.Size(width=32, heads=2, tokens=16, blocks=1, dtype="float32")
    for found in gpu.measure(size, [1], modes=["eager"], repeats=1, device="cpu"):  # noqa: B007
        pass
    assert {result.error for result in found.results} == {"out of memory"}
    assert "| out of memory |" in gpu.to_markdown(found)


def test_flops_of_a_block_are_24_n_d_squared() -> None:
    """Catches FLOPs of embedding or pooling in the blocks' rate."""
    size = gpu.Size(width=6144, heads=48, tokens=256, blocks=4)
    assert size.flops_per_image == 3 * 4 * (24 * 256 * 6144**2 + 4 * 256**2 * 6144)
