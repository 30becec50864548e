"""A few blocks at ViT-22B's width on one GPU: speed and memory of every way to run them.

Forward and backward of `blocks` parallel blocks, without optimizer: micro-batches, eager and compiled, the
recompute policies, attention backends, the two RMS norms. Model FLOPs are three forwards, whatever is
recomputed. The cases do not take turns, since not all of them fit into memory at once. Runs on a CPU as well,
at a small size.

Letters: B batch, N tokens, D width, F MLP width.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavit.bench.counters import BlockMatmuls, memory_of_step
from megavit.bench.kernels import time_by_kind
from megavit.bench.report import Row
from megavit.bench.rounds import clock_of
from megavit.model import norm
from megavit.model.block import make_block
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import trunk_flops_per_token
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.train.logging.meters import nominal_peak

# What a block keeps for backward, in units of D per token: see `model.recompute`.
KEPT: dict[Recompute, int] = {"none": 16, "selective": 9, "full": 1}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Case:
    """One way to run the blocks."""

    micro_batch: int
    recompute: Recompute = "none"
    compiled: bool = False
    attention: str = "default"
    own_norm: bool = False  # megavit's RMS norm in place of torch's fused one


def cases(micro_batches: list[int], modes: list[str]) -> Iterator[Case]:
    """Every micro-batch with each recompute policy, in each of `modes` (eager, compiled); at the second of
    them each attention backend, and our own norm."""
    for micro_batch in micro_batches:
        for mode in modes:
            for recompute in KEPT:
                yield Case(micro_batch, recompute, mode == "compiled")
    middle = micro_batches[min(1, len(micro_batches) - 1)]
    for backend in BACKENDS:
        yield Case(middle, attention=backend)
    yield Case(middle, own_norm=True)


def measure(
    config: ModelConfig,
    micro_batches: list[int],
    *,
    modes: list[str],
    dtype: torch.dtype,
    count: int,
    device: str,
) -> Iterator[Row]:
    """A row for the matmuls alone at each micro-batch, then one for each case, from the medians of `count`
    steps; then, for each recompute policy, where the time goes. A case that does not run has an error."""
    peak = nominal_peak(torch.device(device), dtype)

    def speed(step: Callable[[], None], flops: int) -> Row:
        seconds = _median_s(step, count, device)
        mfu = flops / seconds / peak if peak else None
        return {"ms": seconds * 1e3, "tflop_per_s": flops / seconds / 1e12, "mfu": mfu}

    ceilings: dict[int, float] = {}

    def matmuls(micro_batch: int) -> Row:
        alone = BlockMatmuls(config, micro_batch, dtype, device)
        row = speed(alone, alone.flops)
        ceilings[micro_batch] = row["tflop_per_s"]
        return row

    def run(case: Case) -> Row:
        with _attention(case.attention), _norm(case.own_norm):
            forward, blocks = make_blocks(config, case, dtype, device)
            memory = memory_of_step(forward, lambda: blocks.zero_grad(set_to_none=False))

            def step() -> None:
                forward().backward()
                blocks.zero_grad()  # as at the start of every optimizer step

            tokens = case.micro_batch * config.num_tokens
            row = speed(step, trunk_flops_per_token(config) * tokens)
        # The first block's input is there before the step: its 1 D is added.
        kept = memory.kept / dtype.itemsize / (tokens * config.dim * config.depth) + 1 / config.depth
        ceiling = ceilings.get(case.micro_batch)  # None where the matmuls alone did not run
        return row | {
            "of_ceiling": row["tflop_per_s"] / ceiling if ceiling else None,
            "activations_kept_D": kept,
            "expected_kept_D": KEPT[case.recompute],
            "peak_gib": memory.peak / 2**30,
        }

    def by_kind(case: Case) -> Row:
        return time_by_kind(make_blocks(config, case, dtype, device)[0], device)

    for micro_batch in micro_batches:
        yield {"micro_batch": micro_batch, "work": "matmuls alone"} | _attempt(partial(matmuls, micro_batch))
    for case in cases(micro_batches, modes):
        yield vars(case) | _attempt(partial(run, case))
    for recompute in KEPT:
        case = Case(micro_batches[0], recompute)
        yield {"micro_batch": case.micro_batch, "recompute": recompute} | _attempt(partial(by_kind, case))


def _attempt(measurement: Callable[[], Row]) -> Row:
    """Its columns and no error; or, where memory or a kernel for these shapes is missing, an error alone."""
    try:
        return measurement() | {"error": ""}
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        return {"error": str(error).strip().splitlines()[0][:80]}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def make_blocks(
    config: ModelConfig, case: Case, dtype: torch.dtype, device: str
) -> tuple[Callable[[], Tensor], nn.ModuleList]:
    """The blocks with random weights, and their forward pass on random tokens to a scalar."""
    torch.compiler.reset()
    with torch.device(device):
        init = Initializer(0, Mesh.single(device), deferred=True)
        blocks = nn.ModuleList(
            make_block(config, init.scope(i), case.recompute) for i in range(config.depth)
        ).to(dtype)
        for weight in blocks.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=config.dim**-0.5)
        x = torch.randn(case.micro_batch, config.num_tokens, config.dim, dtype=dtype).requires_grad_()
        grad = torch.randn(x.numel(), dtype=dtype)
    if case.compiled:
        for block in blocks:
            block.forward = torch.compile(block.forward)

    def forward() -> Tensor:
        y: Tensor = x
        for block in blocks:
            y = block(y)
        return y.flatten() @ grad

    return forward, blocks


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


def _median_s(step: Callable[[], None], count: int, device: str) -> float:
    """Median seconds of a step, after one that is not counted."""
    clock = clock_of(device)
    seconds = []
    for _ in range(count + 1):
        started = clock()
        step()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])
