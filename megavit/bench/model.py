"""Whole training steps of our model and of its peers at equal shape, in alternating rounds of one process.

A step is forward, cross-entropy, backward, AdamW (torch's fused one) and clearing the gradients, the same
for all. bfloat16 means bfloat16 parameters, gradients and moments, without autocast. On a CPU the clock is
the process's CPU time, on a GPU wall time after synchronising.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.bench.counters import BlockMatmuls, Memory, forward_flops, memory_of_step
from megavit.bench.peers import REFERENCE, Contestant, Shape
from megavit.bench.rounds import Spread, markdown_table, rounds, speed_ratio, spread

MATMULS = "matmuls alone"
_LR = 1e-4
HOW = """\
Step = forward, cross-entropy, backward, fused AdamW, zero_grad; ratios are medians (lowest..highest) of the
ratios within a round. Like: has QK norm, attention pooling and a classifier, as ours has.
Ceiling: the four matmuls of a block, forward and backward, with nothing else, timed in the same rounds;
a model's FLOPs are three of its forward passes (FlopCounterMode), recomputation not counted.
Held: elements allocated in a forward pass and kept for backward, in units of the width, per token and block:
the difference of models of depth 2 and 1, by the allocator's books. Peak: of one step's forward and backward,
beyond weights, gradients and moments."""


@dataclass(frozen=True)
class Row:
    """One model's results at one shape."""

    model: str
    alike: bool
    images_per_s: float
    x_reference: Spread  # speed, in units of the reference model's
    x_ours: Spread | None  # of megavit's without recomputation, if it takes part
    of_ceiling: Spread
    held: float  # elements a token and block, in units of the width
    peak_mib: float
    note: str


def compare(
    shape: Shape,
    contestants: dict[str, Contestant],
    *,
    count: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """All contestants at `shape` in `count` rounds. The reference is timm's parallel block, or else the
    first."""
    torch.compiler.reset()  # another shape would be compiled as dynamic
    images, labels = _batch(shape, dtype, device)
    memory, flops = {}, {}
    ways: dict[str, Callable[[], None]] = {}
    for name, contestant in contestants.items():
        held = _held_per_block(shape, contestant, dtype, compiled, device)
        model = _build(shape, contestant, dtype, False, device)
        flops[name] = 3 * forward_flops(model, images)
        if compiled:
            _compile(contestant.blocks(model))
        memory[name] = (held, _memory(model, images, labels).peak)
        ways[name] = _step(model, images, labels)
    matmuls = BlockMatmuls(
        shape.batch * shape.num_patches,
        shape.dim,
        shape.mlp_dim,
        repeats=shape.depth,
        dtype=dtype,
        device=device,
    )
    seconds = rounds(ways | {MATMULS: matmuls}, count, clock_of(device))
    reference = seconds[REFERENCE if REFERENCE in seconds else next(iter(seconds))]
    return [
        Row(
            model=name,
            alike=contestant.alike,
            images_per_s=shape.batch / spread(seconds[name]).median,
            x_reference=speed_ratio(reference, seconds[name]),
            x_ours=speed_ratio(seconds["megavit"], seconds[name]) if "megavit" in seconds else None,
            of_ceiling=spread(
                [
                    (flops[name] / mine) / (matmuls.flops / bound)
                    for mine, bound in zip(seconds[name], seconds[MATMULS], strict=True)
                ]
            ),
            held=memory[name][0],
            peak_mib=memory[name][1] / 2**20,
            note=contestant.note,
        )
        for name, contestant in contestants.items()
    ]


def _batch(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    size = (shape.batch, 3, shape.image_size, shape.image_size)
    images = torch.rand(size, device=device, dtype=dtype) * 2 - 1
    return images, torch.randint(0, shape.num_classes, (shape.batch,), device=device)


def _build(
    shape: Shape, contestant: Contestant, dtype: torch.dtype, compiled: bool, device: str
) -> nn.Module:
    torch.manual_seed(0)
    model = contestant.build(shape).to(device=device, dtype=dtype).train()
    if compiled:
        _compile(contestant.blocks(model))
    return model


def _compile(blocks: Iterable[nn.Module]) -> None:
    """As `MegaVit.compile_blocks`, for any model: blocks share a compiled graph."""
    for block in blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def step() -> None:
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _memory(model: nn.Module, images: Tensor, labels: Tensor) -> Memory:
    return memory_of_step(
        lambda: F.cross_entropy(model(images).float(), labels),
        lambda: model.zero_grad(set_to_none=False),
    )


def _held_per_block(
    shape: Shape, contestant: Contestant, dtype: torch.dtype, compiled: bool, device: str
) -> float:
    """Elements kept per token and block, in units of the width; a class token does not count as a token."""
    held = []
    for depth in (1, 2):
        model = _build(replace(shape, depth=depth), contestant, dtype, compiled, device)
        held.append(_memory(model, *_batch(shape, dtype, device)).held)
        del model
        gc.collect()
    return (held[1] - held[0]) / (shape.batch * shape.num_patches * shape.dim * dtype.itemsize)


def clock_of(device: str) -> Callable[[], float]:
    """Seconds that a device has worked: the process's CPU time, or wall time after synchronising."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def to_markdown(rows: list[Row]) -> str:
    header = [
        "model",
        "like",
        "img/s",
        "x reference",
        "x megavit",
        "of ceiling",
        "held, D",
        "peak MiB",
        "note",
    ]
    return markdown_table(
        header,
        [
            [
                row.model,
                "yes" if row.alike else "no",
                f"{row.images_per_s:.2f}",
                str(row.x_reference),
                f"{row.x_ours.median:.3f}" if row.x_ours else "-",
                f"{row.of_ceiling.median:.3f}",
                f"{row.held:.2f}",
                f"{row.peak_mib:,.0f}",
                row.note,
            ]
            for row in rows
        ],
    )


def to_json(rows: list[Row]) -> list[dict[str, Any]]:
    def plain(value: Any) -> Any:
        return value._asdict() if isinstance(value, Spread) else value

    return [{key: plain(value) for key, value in vars(row).items()} for row in rows]


def plot(tables: dict[str, list[Row]], path: Path) -> None:
    """A bar a model, its speed in units of the reference's, with the range over the rounds; a panel a table.
    Needs matplotlib."""
    from matplotlib.figure import Figure

    height = max(map(len, tables.values()))
    figure = Figure(figsize=(6 * len(tables), 1.2 + 0.35 * height), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
    ):
        speeds = [row.x_reference.median for row in rows]
        below = [row.x_reference.median - row.x_reference.low for row in rows]
        above = [row.x_reference.high - row.x_reference.median for row in rows]
        colours = ["tab:blue" if row.model.startswith("megavit") else "tab:gray" for row in rows]
        axes.barh([row.model for row in rows], speeds, xerr=[below, above], color=colours, capsize=2)
        axes.bar_label(
            axes.containers[-1], [f"{speed:.2f}" for speed in speeds], label_type="center", color="w"
        )
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=f"speed of a training step / {REFERENCE}'s")
    figure.savefig(path, dpi=150)
