"""Where the time of a step goes: its forward and backward pass by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megavit.bench.report import Row

# Kinds of kernels (on a CPU: operators), by a part of their names in lower case; the first that fits counts.
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax"),
    "matmul": ("gemm", "nvjet", "cutlass", "::mm", "::addmm", "::bmm", "::dot", "splitk"),
    "norm": ("rms_norm", "rmsnorm", "layer_norm", "gammabeta", "vector_norm"),
    "gelu": ("gelu",),
    "copies": ("memcpy", "memset", "::copy_", "::cat", "::fill_"),
    "reductions": ("reduce", "::sum"),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel of this name; "other" for most elementwise ones."""
    name = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")


def time_by_kind(forward: Callable[[], Tensor], device: str) -> Row:
    """Milliseconds of `forward()` (a scalar) and its backward pass, a column for each kind."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    forward().backward()
    with profile(activities=[activity]) as profiled:
        forward().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    times = {f"{kind}_ms": 0.0 for kind in (*_KINDS, "other")}
    for event in profiled.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[f"{kind_of(event.key)}_ms"] += own / 1e3
    return times
