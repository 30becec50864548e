"""What a training step costs whatever the clock says: FLOPs, activation memory, and the matmul rate that
bounds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megavit.model.config import ModelConfig


class Memory(NamedTuple):
    """Bytes that a step allocates: `kept` for backward, when its forward pass has ended, and `peak`, the most
    at any time until the end of backward. What exists before the step (weights, gradients, images) is in
    neither."""

    kept: int
    peak: int


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Matmul FLOPs (two a multiply-accumulate) of one forward pass, counted as torch executes it."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops())


def memory_of_step(forward: Callable[[], Tensor], clear: Callable[[], None]) -> Memory:
    """The memory of `forward()` (a scalar loss) and of its backward pass, by the allocator's own books:
    exact, and the same for eager, recomputed and compiled code. `clear` makes the gradients zero, in place,
    so that they are there before the measured step.

    On a GPU the books are the caching allocator's, on a CPU the memory events of torch's profiler. A GPU's
    figures are rounded up to 512 bytes a tensor.
    """
    gc.collect()  # or an earlier model might be freed while this one is measured
    for _ in range(2):  # lazy initialisation, compilation and the gradients themselves
        forward().backward()
        clear()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = forward()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return Memory(kept, torch.cuda.max_memory_allocated() - before)
    with _allocations() as events:
        loss = forward()
    kept = sum(_sizes(events))
    clear()
    del loss
    with _allocations() as events:
        forward().backward()
    now = peak = 0
    for size in _sizes(events):
        now += size
        peak = max(peak, now)
    return Memory(kept, peak)


def _allocations() -> Any:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _sizes(profiled: Any) -> list[int]:
    """Bytes of every allocation (positive) and release (negative), in order."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


class BlockMatmuls:
    """The four matmuls of each block, forward and backward, on a batch of images, and nothing else: the rate
    that no step at this shape can exceed by much.

    Nothing is allocated while it runs. Calling it does `flops` FLOPs.
    """

    def __init__(self, config: ModelConfig, batch: int, dtype: torch.dtype, device: str):
        rows, dim, mlp_dim = batch * config.num_patches, config.dim, config.mlp_dim
        shapes = [(dim, 3 * dim), (dim, dim), (dim, mlp_dim), (mlp_dim, dim)]  # in, out
        self._depth = config.depth
        self.flops = 6 * rows * config.depth * sum(fan_in * fan_out for fan_in, fan_out in shapes)

        def random(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        self._layers = []
        for fan_in, fan_out in shapes:
            x, weight, grad = random(rows, fan_in), random(fan_out, fan_in), random(rows, fan_out)
            self._layers.append((x, weight, grad, *map(torch.empty_like, (grad, x, weight))))

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self._depth):
            for x, weight, grad, out, grad_x, grad_weight in self._layers:
                torch.mm(x, weight.t(), out=out)
                torch.mm(grad, weight, out=grad_x)
                torch.mm(grad.t(), x, out=grad_weight)
