"""What is known of GPUs: the data sheets' numbers. The log's MFU and the planner share this table.

Sources: vendors' data sheets, dense rates (without sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass

from megavit.fields import nearest


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory_gib` is what the driver shows a process; `device` a part of the name that CUDA
    gives it."""

    name: str
    device: str
    memory_gib: float
    tflops: float  # bf16, dense
    memory_gb_per_s: float
    link_gb_per_s: float  # to the node's other GPUs, per direction
    host_gb_per_s: float  # to the host's memory, per direction
    processors: int  # streaming multiprocessors: matmul tiles run in waves of so many


_GPUS = (
    Gpu("gb200", "GB200", 184.0, 2500, 8000, 900, 200, 148),
    Gpu("b200", "B200", 178.4, 2250, 8000, 900, 50, 148),
    Gpu("h200", "H200", 139.8, 989, 4800, 450, 50, 132),
    Gpu("h20", "H20", 95.6, 148, 4000, 450, 50, 78),
    Gpu("h100_pcie", "H100 PCIe", 79.1, 756, 2000, 50, 50, 114),
    Gpu("h100_nvl", "H100 NVL", 93.1, 835, 3900, 300, 50, 132),
    Gpu("h100", "H100", 79.1, 989, 3350, 450, 50, 132),
    Gpu("a100_80", "A100", 79.2, 312, 2039, 300, 25, 108),
    Gpu("a100_40", "A100", 39.4, 312, 1555, 300, 25, 108),
    # A few cores of a host, to try a plan out on nodes without GPUs; rough.
    Gpu("cpu", "cpu", 64.0, 0.5, 50, 10, 50, 1),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


def gpu_named(name: str) -> Gpu:
    """ValueError, with the nearest name, for one that is not in the table."""
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}{nearest(name, GPUS)}; known: {', '.join(sorted(GPUS))}")
    return GPUS[name]


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that CUDA calls `device`; None if it is not in the table."""
    for gpu in _GPUS:  # the longer name comes first
        if gpu.device in device:
            return gpu.tflops * 1e12
    return None
