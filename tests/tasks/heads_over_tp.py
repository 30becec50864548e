"""What DPT's convolutions cost on two TP ranks: whole on each, or cut by channels.

    python -m tests.tasks.heads_over_tp

A fusion level of the decoder has two residual units, each of two 3 x 3 convolutions on maps of C channels.
Cut, a rank has half of the first one's outputs and of the second one's inputs, and the sums are reduced, once
forward and once backward a unit. Prints CPU seconds a step and rank, memory kept for backward, and bytes that
a rank reduces, for maps of the four sides of a grid of 8 x 8.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.bench.counters import memory_of_step
from megavit.parallel.collectives import copy_to_tp, reduce_from_tp
from megavit.parallel.mesh import Mesh
from tests.ranks import run_ranks

CHANNELS, SIDES, BATCH, ROUNDS = 256, (32, 16, 8, 4), 1, 3


def unit(x: Tensor, first: Tensor, second: Tensor, mesh: Mesh | None) -> Tensor:
    """x + conv(relu(conv(relu(x)))), cut over the TP group if there is a mesh."""
    y = F.relu(x) if mesh is None else copy_to_tp(mesh, F.relu(x))[0]
    y = F.conv2d(F.relu(F.conv2d(y, first, None, 1, 1)), second, None, 1, 1)
    return x + (y if mesh is None else reduce_from_tp(mesh, y))


def _kernels(own: int) -> tuple[Tensor, Tensor]:
    shapes = (own, CHANNELS, 3, 3), (CHANNELS, own, 3, 3)
    first, second = (torch.randn(shape).mul_(0.01).requires_grad_() for shape in shapes)
    return first, second


def measure_here() -> dict[str, tuple[float, float]]:
    """In a rank: of each way the CPU seconds of a step, and the MiB kept for backward."""
    mesh = Mesh.from_environment(2)
    maps = [torch.randn(BATCH, CHANNELS, side, side, requires_grad=True) for side in SIDES]
    kernels = {
        "whole": [[_kernels(CHANNELS) for _ in range(2)] for _ in SIDES],
        "cut": [[_kernels(CHANNELS // 2) for _ in range(2)] for _ in SIDES],
    }
    weights = [part for way in kernels.values() for level in way for pair in level for part in pair]
    found: dict[str, list[float]] = {"whole": [], "cut": []}
    kept = {}

    def loss(way: str) -> Tensor:
        total = torch.zeros(())
        for x, level in zip(maps, kernels[way], strict=True):
            for first, second in level:
                x = unit(x, first, second, mesh if way == "cut" else None)
            total = total + x.sum()
        return total

    def clear() -> None:
        for tensor in (*maps, *weights):
            if tensor.grad is not None:
                tensor.grad.zero_()

    for way in found:
        kept[way] = memory_of_step(lambda way=way: loss(way), clear).kept / 2**20
    for number in range(ROUNDS):
        for way in list(found)[:: 1 if number % 2 else -1]:
            started = time.process_time()
            loss(way).backward()
            found[way].append(time.process_time() - started)
    return {way: (statistics.median(seconds), kept[way]) for way, seconds in found.items()}


if __name__ == "__main__":
    (first, second) = run_ranks(2, measure_here)
    for way in first:
        seconds = (first[way][0] + second[way][0]) / 2
        print(f"{way}: {seconds:.2f} s of CPU a step and rank, {first[way][1]:.0f} MiB kept")
    reduced = sum(2 * 2 * BATCH * CHANNELS * side**2 * 4 for side in SIDES)
    print(f"cut, reduced by a rank: {reduced / 2**20:.0f} MiB a step and picture in float32")
