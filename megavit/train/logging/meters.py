"""Memory that a rank has used, and the FLOP/s against which its speed is measured."""

from __future__ import annotations

import resource
import time

import torch

from megavit.gpus import peak_flops
from megavit.parallel.mesh import Mesh


def memory_gib(mesh: Mesh) -> float:
    """Peak memory of this rank: the allocator's on a GPU, resident memory on a CPU."""
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated(mesh.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def nominal_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of a GPU's dense bfloat16 matmuls; None for another dtype or device."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return peak_flops(torch.cuda.get_device_name(device))
    return None


def rank_peak_flops(mesh: Mesh, dtype: torch.dtype) -> float | None:
    """FLOP/s of one rank's GPU in the matmuls' dtype: the data sheet's, else the best of a few matmuls
    (0.1 s). None on a CPU: what it can do depends on who else uses it, so a share of it tells nothing."""
    if mesh.device.type == "cpu":
        return None
    if peak := nominal_peak(mesh.device, dtype):
        return peak
    side = 8192
    a = torch.randn(side, side, device=mesh.device, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
