"""What matmuls reach at the shapes of a block: forward, the input's gradient, the weight's gradient, in
bfloat16 and in fp8 with scales.

Letters: R rows (batch x tokens), I and O a layer's input and output width; M, N, K those of one product
[M, K] x [K, N].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megavit.bench.counters import BlockMatmuls
from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case, Unavailable
from megavit.bench.report import Row
from megavit.bench.rounds import clock_of, kernel_s
from megavit.model.config import ModelConfig
from megavit.parallel.fp8 import check_device, product_of_rounded, rounded

PASSES = ("forward", "input gradient", "weight gradient")
DTYPES = ("bfloat16", "fp8 by row", "fp8 by tensor")  # the last two: what has a scale of its own


def layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(I, O) of a block's four matmuls."""
    dim, mlp_dim = config.dim, config.mlp_dim
    return {"qkv": (dim, 3 * dim), "out": (dim, dim), "up": (dim, mlp_dim), "down": (mlp_dim, dim)}


def product_of(rows: int, fan_in: int, fan_out: int, which: str) -> tuple[int, int, int]:
    """(M, N, K) of a layer's product in one of its `PASSES`."""
    return {
        "forward": (rows, fan_out, fan_in),
        "input gradient": (rows, fan_in, fan_out),
        "weight gradient": (fan_out, fan_in, rows),
    }[which]


def cases(setting: Setting) -> Iterator[Case]:
    first, *others = setting.micro_batches
    rows = first * setting.block.num_tokens
    sides = (16, 32) if setting.dry else (8192, 16384)

    def product(work: str, which: str, dtype: str, *size: int) -> Case:
        names = {"work": work, "pass": which, "dtype": dtype}
        return Case(names, partial(_product, setting, which, dtype, *size))

    def block(micro_batch: int) -> Case:
        names = {"work": f"the four, micro-batch {micro_batch}", "pass": "all", "dtype": "bfloat16"}
        return Case(names, partial(_block, setting, micro_batch))

    yield block(first)
    # Published ceilings are those of the best of many shapes; these are near it.
    for dtype in DTYPES:
        yield product("square", "forward", dtype, *[sides[0]] * 3)
    for dtype in DTYPES:
        for name, (fan_in, fan_out) in layers(setting.block).items():
            for which in PASSES:
                yield product(name, which, dtype, *product_of(rows, fan_in, fan_out, which))
    names = {"work": "the four, for long", "pass": "all", "dtype": "bfloat16"}
    yield Case(names, partial(_sustained, setting))
    for name, (fan_in, fan_out) in layers(setting.block).items():
        names = {"work": f"{name} and its sum", "pass": "forward", "dtype": "bfloat16"}
        yield Case(names, partial(_with_sum, setting, rows, fan_out, fan_in))
    for micro_batch in others:
        yield block(micro_batch)
    yield product("square", "forward", "bfloat16", *[sides[1]] * 3)


def _speed(setting: Setting, call: Callable[[], object], flops: int, *, fp8: bool = False) -> Row:
    seconds = kernel_s(call, setting.kernel_s, setting.device)
    rate = flops / seconds
    return {"ms": seconds * 1e3, "tflop_per_s": rate / 1e12, "of_peak": setting.of_peak(rate, fp8=fp8)}


def _random(setting: Setting, *size: int) -> Tensor:
    # Never zeros: they draw less power, and are multiplied faster than what a model holds.
    return torch.randn(size, device=setting.device, dtype=setting.dtype)


def _product(setting: Setting, which: str, dtype: str, m: int, n: int, k: int) -> Row:
    """[M, K] x [K, N], its operands laid out as in the pass: a layer's weight is [O, I]."""
    size = {"M": m, "N": n, "K": k}
    if dtype != "bfloat16":
        call = fp8_product(setting, m, n, k, by_row=dtype == "fp8 by row")
        return size | _speed(setting, call, 2 * m * n * k, fp8=True)
    a = _random(setting, k, m).t() if which == "weight gradient" else _random(setting, m, k)
    b = _random(setting, n, k).t() if which == "forward" else _random(setting, k, n)
    out = torch.empty(m, n, device=setting.device, dtype=setting.dtype)
    return size | _speed(setting, lambda: torch.mm(a, b, out=out), 2 * m * n * k)


def require_fp8(setting: Setting) -> None:
    """Unavailable where the library or the GPU has no fp8."""
    try:
        check_device(torch.device(setting.device), bf16=True)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def fp8_product(setting: Setting, m: int, n: int, k: int, *, by_row: bool) -> Callable[[], Tensor]:
    """The product of operands that are there in e4m3, the second one as [N, K]: the units want both along K.
    By row it is what the layers call."""
    require_fp8(setting)
    a, b = _random(setting, m, k), _random(setting, n, k)
    if by_row:
        return partial(product_of_rounded, rounded(a), rounded(b), setting.dtype)
    # One scale for all rows: that of the operand as a single row.
    (a_8, a_scale), (b_8, b_scale) = (rounded(operand.view(1, -1)) for operand in (a, b))
    return partial(
        torch._scaled_mm,
        a_8.view(m, k),
        b_8.view(n, k).t(),
        scale_a=a_scale.view(()),
        scale_b=b_scale.view(()),
        out_dtype=setting.dtype,
        use_fast_accum=True,
    )


def _with_sum(setting: Setting, m: int, n: int, k: int) -> Row:
    """As the layers call it: another term of the sum (a bias, or the residual stream) joins in the matmul."""
    a, b, addend = _random(setting, m, k), _random(setting, n, k), _random(setting, m, n)
    size = {"M": m, "N": n, "K": k}
    return size | _speed(setting, lambda: torch.addmm(addend, a, b.t()), 2 * m * n * k)


def _block(setting: Setting, micro_batch: int) -> Row:
    alone = BlockMatmuls(setting.block, micro_batch, setting.dtype, setting.device)
    rows = micro_batch * setting.block.num_tokens
    return {"M": rows, "N": None, "K": None} | _speed(setting, alone, alone.flops)


def _sustained(setting: Setting) -> Row:
    rate = sustained_rate(setting)
    clock, watts = _clock_and_power(setting.device)
    return {
        "M": setting.micro_batches[0] * setting.block.num_tokens,
        "N": None,
        "K": None,
        "ms": None,
        "tflop_per_s": rate / 1e12,
        "of_peak": setting.of_peak(rate),
        "sm_mhz": clock,
        "watts": watts,
    }


def sustained_rate(setting: Setting) -> float:
    """FLOP/s of a block's matmuls after `setting.sustained_s` of them: clocks fall when a GPU has drawn its
    full power for a while."""
    alone = BlockMatmuls(setting.block, setting.micro_batches[0], setting.dtype, setting.device)
    clock, started = clock_of(setting.device), time.monotonic()
    while True:
        before = clock()
        for _ in range(4):
            alone()
        seconds = (clock() - before) / 4
        if time.monotonic() - started >= setting.sustained_s:
            return alone.flops / max(seconds, 1e-9)


def _clock_and_power(device: str) -> tuple[float | None, float | None]:
    """(MHz of the processors, watts) at this moment; None where the driver's library is not there."""
    if device != "cuda":
        return None, None
    try:
        return float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1e3
    except Exception:  # the library's own kinds of errors
        return None, None
