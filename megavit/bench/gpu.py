"""A few blocks at ViT-22B's width on one GPU: speed and memory of every way to run them.

Forward and backward of `blocks` parallel blocks, without optimizer: micro-batches, eager and compiled, the
recompute policies, attention backends, the two RMS norms. Model FLOPs are three forwards, whatever is
recomputed. Runs on a CPU as well, at a small size.

Letters: B batch, N tokens, D width, F MLP width.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavit.bench.counters import BlockMatmuls, memory_of_step
from megavit.bench.model import clock_of
from megavit.bench.rounds import markdown_table
from megavit.model import norm
from megavit.model.block import make_block
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import forward_flops
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.train.logging.meters import nominal_peak

# What a block keeps for backward, in units of D per token: see `model.recompute`.
HELD: dict[Recompute, int] = {"none": 16, "selective": 9, "full": 1}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Size:
    """The blocks that are measured; ViT-22B's but for their number."""

    width: int = 6144
    heads: int = 48
    tokens: int = 256
    blocks: int = 4
    dtype: str = "bfloat16"

    @property
    def config(self) -> ModelConfig:
        side = round(self.tokens**0.5)
        if side * side != self.tokens:
            raise ValueError(f"--tokens {self.tokens} is no square of a number of patches")
        return ModelConfig(
            name="blocks",
            image_size=side,
            patch_size=1,
            dim=self.width,
            depth=self.blocks,
            num_heads=self.heads,
            mlp_dim=4 * self.width,
            num_classes=0,
            pool="mean",
        )

    @property
    def flops_per_image(self) -> int:
        """Forward and backward of all blocks, without embedding and pooling."""
        embed = 2 * self.tokens * self.width * self.config.channels
        return 3 * (forward_flops(self.config) - embed)


@dataclass(frozen=True)
class Case:
    """One way to run the blocks."""

    micro_batch: int
    recompute: Recompute = "none"
    compiled: bool = False
    backend: str = "default"
    own_norm: bool = False  # megavit's RMS norm in place of torch's fused one


@dataclass
class Result:
    """What a case measured; all None, with `error`, where it does not run."""

    case: Case
    ms: float | None = None
    tflops: float | None = None
    mfu: float | None = None  # of the data sheet's peak
    of_ceiling: float | None = None  # of the matmuls alone, at this micro-batch
    held: float | None = None  # elements a token and block, in units of D
    peak_gib: float | None = None
    error: str = ""


@dataclass
class Measured:
    """All results of a call, and the rates that they are compared with."""

    size: Size
    device: str
    peak_tflops: float | None
    ceiling_tflops: dict[int, float] = field(default_factory=dict)  # by micro-batch
    results: list[Result] = field(default_factory=list)


def cases(micro_batches: list[int], modes: list[str]) -> Iterator[Case]:
    """Every micro-batch with each recompute policy, in each of `modes` (eager, compiled); at the second of
    them each attention backend, and our own norm."""
    for micro_batch in micro_batches:
        for mode in modes:
            for recompute in HELD:
                yield Case(micro_batch, recompute, mode == "compiled")
    middle = micro_batches[min(1, len(micro_batches) - 1)]
    for backend in BACKENDS:
        yield Case(middle, backend=backend)
    yield Case(middle, own_norm=True)


def measure(
    size: Size, micro_batches: list[int], *, modes: list[str], repeats: int, device: str
) -> Iterator[Measured]:
    """Run all cases; yields what is known after each."""
    found = Measured(size, _device_name(device), _peak(size, device))
    for micro_batch in micro_batches:
        found.ceiling_tflops[micro_batch] = _ceiling(size, micro_batch, repeats, device)
    for case in cases(micro_batches, modes):
        result = Result(case)
        try:
            _run(size, case, result, repeats, device)
        except torch.OutOfMemoryError:
            result.error = "out of memory"
        except RuntimeError as error:  # a backend that does not take these shapes
            result.error = str(error).strip().splitlines()[0][:80]
        if result.ms is not None and result.tflops is not None:
            result.of_ceiling = result.tflops / found.ceiling_tflops[case.micro_batch]
            result.mfu = result.tflops / found.peak_tflops if found.peak_tflops else None
        free_memory()
        found.results.append(result)
        yield found


def _run(size: Size, case: Case, result: Result, repeats: int, device: str) -> None:
    """Fill `result`."""
    with _attention(case.backend), _norm(case.own_norm):
        forward, blocks = make_blocks(size, case, device)
        memory = memory_of_step(forward, lambda: blocks.zero_grad(set_to_none=False))

        def step() -> None:
            forward().backward()
            blocks.zero_grad()  # as at the start of every optimizer step

        seconds = _timed(step, repeats, device)
    elements = case.micro_batch * size.tokens * size.width * size.blocks
    # The first block's input is there before the step: its 1 D is added.
    held = memory.held / getattr(torch, size.dtype).itemsize / elements + 1 / size.blocks
    result.ms = seconds * 1e3
    result.tflops = size.flops_per_image * case.micro_batch / seconds / 1e12
    result.held = held
    result.peak_gib = memory.peak / 2**30


def make_blocks(size: Size, case: Case, device: str) -> tuple[Callable[[], Tensor], nn.ModuleList]:
    """The blocks with random weights, and their forward pass on random tokens to a scalar."""
    dtype, config = getattr(torch, size.dtype), size.config
    torch.compiler.reset()
    with torch.device(device):
        init = Initializer(0, Mesh.single(device), deferred=True)
        blocks = nn.ModuleList(
            make_block(config, init.scope(i), case.recompute) for i in range(size.blocks)
        ).to(dtype)
        for weight in blocks.parameters():
            nn.init.normal_(weight, mean=float(weight.ndim == 1), std=size.width**-0.5)
        x = torch.randn(case.micro_batch, size.tokens, size.width, dtype=dtype).requires_grad_()
        grad = torch.randn(x.numel(), dtype=dtype)
    if case.compiled:
        for block in blocks:
            block.forward = torch.compile(block.forward)

    def forward() -> Tensor:
        y: Tensor = x
        for block in blocks:
            y, _ = block(y)
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


def _timed(step: Callable[[], None], repeats: int, device: str) -> float:
    """Median seconds of a step, after one that is not counted."""
    clock = clock_of(device)
    seconds = []
    for _ in range(repeats + 1):
        started = clock()
        step()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def _ceiling(size: Size, micro_batch: int, repeats: int, device: str) -> float:
    dtype = getattr(torch, size.dtype)
    matmuls = BlockMatmuls(micro_batch * size.tokens, size.width, 4 * size.width, dtype=dtype, device=device)
    tflops = matmuls.flops / _timed(matmuls, repeats, device) / 1e12
    del matmuls
    free_memory()
    return tflops


def _peak(size: Size, device: str) -> float | None:
    peak = nominal_peak(torch.device(device), getattr(torch, size.dtype))
    return peak / 1e12 if peak else None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def to_markdown(found: Measured) -> str:
    """The table of all cases so far."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    header = ["batch", "recompute", "mode", "attention", "norm", "ms", "TFLOP/s", "MFU", "of ceiling"]
    header += ["held, D", "formula", "peak GiB", ""]
    rows = []
    for r in found.results:
        case = r.case
        rows.append(
            [
                str(case.micro_batch),
                case.recompute,
                "compiled" if case.compiled else "eager",
                case.backend,
                "megavit's" if case.own_norm else "default",
                cell(r.ms, ".2f"),
                cell(r.tflops, ".4g"),
                cell(r.mfu, ".1%"),
                cell(r.of_ceiling, ".3f"),
                cell(r.held, ".2f"),
                str(HELD[case.recompute]),
                cell(r.peak_gib, ".2f"),
                r.error,
            ]
        )
    return markdown_table(header, rows)


def to_json(found: Measured) -> dict[str, Any]:
    return asdict(found)


def describe(found: Measured) -> str:
    """Device, sizes, and the rates that the table's fractions refer to."""
    size = found.size
    peak = f"{found.peak_tflops:.0f} TFLOP/s" if found.peak_tflops else "not known"
    rates = ", ".join(f"{rate:.4g} at batch {batch}" for batch, rate in found.ceiling_tflops.items())
    return (
        f"{found.device}, torch {torch.__version__}: {size.blocks} blocks, width {size.width}, "
        f"{size.heads} heads, {size.tokens} tokens, {size.dtype}; nominal peak {peak}; "
        f"matmuls alone {rates} TFLOP/s.\n"
        f"Forward and backward without optimizer; TFLOP/s of three forwards, recomputation not counted."
    )
