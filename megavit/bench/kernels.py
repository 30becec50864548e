"""Where the time of a block goes: forward and backward by kind of kernel, and its chart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megavit.bench.gpu import HELD, Case, Size, free_memory, make_blocks

# Kinds of kernels (on a CPU: operators), by a part of their names; the first that fits counts.
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax"),
    "matmul": (
        "gemm",
        "nvjet",
        "cutlass",
        "::mm",
        "::addmm",
        "::bmm",
        "onednn",
        "_linear_pointwise",
        "splitk",
    ),
    "norm": ("rms_norm", "rmsnorm", "layer_norm", "vector_norm", "_RmsNorm"),
    "GELU": ("gelu",),
    "copies": ("memcpy", "memset", "::copy_", "::cat", "::fill_"),
    "reductions": ("reduce", "::sum"),
}


def time_by_kind(size: Size, micro_batch: int, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by kind of kernel, for each recompute policy, eager."""
    kind_of = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    found = {}
    for recompute in HELD:
        forward, _ = make_blocks(size, Case(micro_batch, recompute), device)
        forward().backward()
        with profile(activities=[kind_of]) as profiled:
            forward().backward()
            if device == "cuda":
                torch.cuda.synchronize()
        times = dict.fromkeys([*_KINDS, "other"], 0.0)
        for event in profiled.key_averages():
            kind = next((k for k, parts in _KINDS.items() if any(p in event.key for p in parts)), "other")
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            times[kind] += own / 1e3
        found[recompute] = times
        del forward
        free_memory()
    return found


def plot(times: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """A stacked bar a recompute policy. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(times, 0.0)
    for kind in next(iter(times.values())):
        widths = [times[policy][kind] for policy in times]
        axes.barh(list(times), widths, left=list(left.values()), label=kind)
        left = {policy: left[policy] + times[policy][kind] for policy in times}
    axes.invert_yaxis()
    axes.set(title=title, xlabel="ms of a forward and backward pass")
    figure.legend(loc="outside right")
    figure.savefig(path, dpi=150)
