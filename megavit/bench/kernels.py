"""Where the time of a step goes, by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from megavit.bench.report import Row

# Kinds of kernels (on a CPU: operators), by a part of their names in lower case; the first that fits counts.
# The compiler names its kernels for the operators that they join: of norms and GELUs the joined ones count
# as the norm's.
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax"),
    "matmul": ("gemm", "nvjet", "cutlass", "::mm", "::addmm", "::bmm", "::dot", "splitk", "scaled_mm"),
    "norm": ("rms_norm", "rmsnorm", "layer_norm", "gammabeta", "vector_norm", "rsqrt"),
    "gelu": ("gelu", "tanh"),
    "copies": ("memcpy", "memset", "::copy_", "copy_kernel", "::cat", "::fill_"),
    "reductions": ("reduce", "::sum"),
}
_SHOWN, _NAME = 6, 70  # kernels, and characters of a name


def kind_of(kernel: str) -> str:
    """The kind of a kernel of this name; "other" for most elementwise ones."""
    name = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")


def time_by_kind(step: Callable[[], object], device: str) -> Row:
    """Milliseconds of `step()`, a column for each kind; the number of kernels; and in words those that took
    longest and are no matmul or attention."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    step()
    with profile(activities=[activity]) as profiled:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    times = {f"{kind}_ms": 0.0 for kind in (*_KINDS, "other")}
    kernels, small = 0, []
    for event in profiled.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if getattr(event, "is_user_annotation", False) or not own:  # spans over kernels; calls of the driver
            continue
        kind = kind_of(event.key)
        times[f"{kind}_ms"] += own / 1e3
        kernels += event.count
        if kind not in ("attention", "matmul"):
            small.append((own / 1e3, event.count, event.key))
    longest = "; ".join(
        f"{ms:.3g} ms in {count} x {name[:_NAME]}" for ms, count, name in sorted(small, reverse=True)[:_SHOWN]
    )
    return times | {"kernels": kernels, "longest_others": longest}
