"""Whole training steps of our model and of its peers at equal shape, in alternating rounds of one process.

A step is forward, cross-entropy, backward, AdamW (torch's fused one) and clearing the gradients, the same
for all. bfloat16 means bfloat16 parameters, gradients and moments, without autocast. On a CPU the clock is
the process's CPU time, on a GPU wall time after synchronising.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.bench.counters import BlockMatmuls, Memory, forward_flops, memory_of_step
from megavit.bench.peers import REFERENCE, Contestant
from megavit.bench.report import Row
from megavit.bench.rounds import clock_of, ratio_to, rounds
from megavit.model.config import ModelConfig

_MATMULS = "matmuls alone"
_LR = 1e-4


def compare(
    config: ModelConfig,
    batch: int,
    contestants: dict[str, Contestant],
    *,
    count: int,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    device: str = "cpu",
) -> Iterator[Row]:
    """A row for each contestant at the shape of `config`, from `count` rounds. Speeds are compared with
    timm's parallel block, or else with the first contestant."""
    torch.compiler.reset()  # another shape would be compiled as dynamic
    side = config.image_size
    images = torch.rand(batch, 3, side, side, device=device, dtype=dtype) * 2 - 1
    labels = torch.randint(0, config.num_classes, (batch,), device=device)

    def build(contestant: Contestant, depth: int, compiled: bool) -> nn.Module:
        torch.manual_seed(0)
        model = contestant.build(replace(config, depth=depth)).to(device=device, dtype=dtype).train()
        for block in contestant.blocks(model) if compiled else ():  # they share a compiled graph
            block.forward = torch.compile(block.forward)
        return model

    def memory(model: nn.Module) -> Memory:
        return memory_of_step(
            lambda: F.cross_entropy(model(images).float(), labels),
            lambda: model.zero_grad(set_to_none=False),
        )

    kept, peak, flops = {}, {}, {}
    ways: dict[str, Callable[[], None]] = {}
    for name, contestant in contestants.items():
        one, two = (memory(build(contestant, depth, compiled)).kept for depth in (1, 2))
        kept[name] = (two - one) / (batch * config.num_patches * config.dim * dtype.itemsize)
        flops[name] = 3 * forward_flops(build(contestant, config.depth, False), images)
        model = build(contestant, config.depth, compiled)
        peak[name] = memory(model).peak
        ways[name] = training_step(model, images, labels)
    matmuls = BlockMatmuls(config, batch, dtype, device)
    seconds = rounds(ways | {_MATMULS: matmuls}, count, clock_of(device))
    reference = REFERENCE if REFERENCE in ways else next(iter(ways))
    for name, contestant in contestants.items():
        of_matmuls = ratio_to(_MATMULS, seconds, name)["ratio_median"]
        yield {
            "shape": config.name,
            "model": name,
            "like_for_like": contestant.alike,
            "images_per_s": batch / statistics.median(seconds[name]),
            **ratio_to(reference, seconds, name),
            "of_ceiling": of_matmuls * flops[name] / matmuls.flops,
            "activations_kept_D": kept[name],
            "peak_mib": peak[name] / 2**20,
            "note": contestant.note,
        }


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, cross-entropy, backward and torch's fused AdamW, on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def step() -> None:
        F.cross_entropy(model(images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
