"""A few blocks at ViT-22B's width: speed and memory of every way to run them, and where the time goes.

Forward and backward of some parallel blocks, without optimizer: micro-batches, eager and compiled, the
recompute policies, attention backends, the two RMS norms. Model FLOPs are three forwards, whatever is
recomputed. The cases do not take turns, since not all of them fit into memory at once.

Letters: B batch, N tokens, D width, F MLP width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavit.bench.counters import BlockMatmuls, memory_of_step
from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case
from megavit.bench.kernels import time_by_kind
from megavit.bench.report import Row
from megavit.bench.rounds import kernel_s, median_s
from megavit.model import norm
from megavit.model.block import make_block
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import trunk_flops_per_token
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh

# What a block keeps for backward, in units of D per token: see `model.recompute`.
KEPT: dict[Recompute, int] = {"none": 16, "selective": 9, "full": 1}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Way:
    """One way to run the blocks."""

    micro_batch: int
    recompute: Recompute = "none"
    compiled: bool = False
    attention: str = "default"
    own_norm: bool = False  # megavit's RMS norm in place of torch's fused one


def ways(micro_batches: tuple[int, ...]) -> Iterator[Way]:
    """At the first micro-batch both policies with few repeated FLOPs, compiled and eager; compiled at the
    others; then, eager, full recomputation, attention backends and our own norm."""
    first, *others = micro_batches
    kept: tuple[Recompute, ...] = ("none", "selective")
    for recompute in kept:
        for compiled in (True, False):
            yield Way(first, recompute, compiled)
    for micro_batch in others:
        for recompute in kept:
            yield Way(micro_batch, recompute, True)
    yield Way(first, "full")
    for backend in BACKENDS:
        yield Way(first, attention=backend)
    yield Way(first, own_norm=True)


def cases(setting: Setting) -> Iterator[Case]:
    """The first four ways, where their time goes, the other ways."""
    ceilings: dict[int, float] = {}
    first = setting.micro_batches[0]
    found = list(ways(setting.micro_batches))
    for way in found[:4]:
        yield Case(vars(way), partial(run, setting, way, ceilings))
    for way in (Way(first, compiled=True), Way(first), Way(first, "selective", compiled=True)):
        yield Case({"profile of": _in_words(way)}, partial(where_time_goes, setting, way))
    for way in found[4:]:
        yield Case(vars(way), partial(run, setting, way, ceilings))


def run(setting: Setting, way: Way, ceilings: dict[int, float]) -> Row:
    """Speed and memory. `ceilings` remembers the rates of the matmuls alone, by micro-batch."""
    config, dtype, device = setting.block, setting.dtype, setting.device
    tokens = way.micro_batch * config.num_tokens
    if way.micro_batch not in ceilings:
        ceilings[way.micro_batch] = matmul_rate(setting, way.micro_batch)
    with _attention(way.attention), _norm(way.own_norm):
        forward, blocks = make_blocks(setting, config, way)
        memory = memory_of_step(forward, lambda: blocks.zero_grad(set_to_none=False))
        seconds = median_s(step_of(forward, blocks), setting.steps, device)
    rate = trunk_flops_per_token(config) * tokens / seconds
    # The first block's input is there before the step: its 1 D is added.
    kept = memory.kept / dtype.itemsize / (tokens * config.dim * config.depth) + 1 / config.depth
    return {
        "ms": seconds * 1e3,
        "tflop_per_s": rate / 1e12,
        "mfu": setting.of_peak(rate),
        "of_ceiling": rate / ceilings[way.micro_batch],
        "activations_kept_D": kept,
        "expected_kept_D": KEPT[way.recompute],
        "peak_gib": memory.peak / 2**30,
    }


def where_time_goes(setting: Setting, way: Way) -> Row:
    """Milliseconds of one forward and backward pass by kind of kernel, and of gaps between kernels: wall time
    without the profiler, less the sum of the kernels' times."""
    forward, blocks = make_blocks(setting, setting.block, way)
    step = step_of(forward, blocks)
    wall_ms = median_s(step, setting.steps, setting.device) * 1e3
    times = time_by_kind(step, setting.device)
    gaps_ms = wall_ms - sum(time for name, time in times.items() if name.endswith("_ms"))
    return {"wall_ms": wall_ms, "gaps_ms": gaps_ms} | times


def matmul_rate(setting: Setting, micro_batch: int) -> float:
    """FLOP/s of a block's four matmuls alone, forward and backward."""
    alone = BlockMatmuls(setting.block, micro_batch, setting.dtype, setting.device)
    return alone.flops / kernel_s(alone, setting.kernel_s, setting.device)


def make_blocks(
    setting: Setting, config: ModelConfig, way: Way
) -> tuple[Callable[[], Tensor], nn.ModuleList]:
    """The blocks of `config` with random weights, and their forward pass on random tokens to a scalar."""
    torch.compiler.reset()
    device, dtype = setting.device, setting.dtype
    with torch.device(device):
        init = Initializer(0, Mesh.single(device), deferred=True)
        blocks = nn.ModuleList(
            make_block(config, init.scope(i), way.recompute) for i in range(config.depth)
        ).to(dtype)
        for weight in blocks.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=config.dim**-0.5)
        x = torch.randn(way.micro_batch, config.num_tokens, config.dim, dtype=dtype).requires_grad_()
        grad = torch.randn(x.numel(), dtype=dtype)
    if way.compiled:
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=setting.compiler)

    def forward() -> Tensor:
        y: Tensor = x
        for block in blocks:
            y = block(y)
        return y.flatten() @ grad

    return forward, blocks


def step_of(forward: Callable[[], Tensor], blocks: nn.ModuleList) -> Callable[[], None]:
    """Forward, backward, and what begins every optimizer step."""

    def step() -> None:
        forward().backward()
        blocks.zero_grad()

    return step


def _in_words(way: Way) -> str:
    mode = "compiled" if way.compiled else "eager"
    return f"{mode}, recompute {way.recompute}, micro-batch {way.micro_batch}"


def _attention(backend: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend == "default" else sdpa_kernel(BACKENDS[backend])


@contextlib.contextmanager
def _norm(own: bool) -> Iterator[None]:
    """With `own`, blocks use megavit's RMS norm on a GPU too."""
    before = norm.has_fused_rms_norm
    if own:
        norm.has_fused_rms_norm = lambda x: False
    try:
        yield
    finally:
        norm.has_fused_rms_norm = before
