"""What is known of GPUs: the data sheets' numbers. The log's MFU and the planner share this table.

Rates are dense, in bfloat16 with float32 accumulation; data sheets often print twice as much, "with
sparsity". Sources, by row, are in `megavit/scale/README.md`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

_PCIE4, _PCIE5 = 32.0, 64.0  # GB/s of 16 lanes, per direction


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `memory_gib` is what CUDA shows a process, which is less than the data sheet's;
    `device` is a part of the name that CUDA gives it. Bandwidths are nominal."""

    name: str
    device: str
    memory_gib: float
    tflops: float  # bf16, dense
    memory_gb_per_s: float
    link_gb_per_s: float  # to the node's other GPUs, per direction
    host_gb_per_s: float  # to the host's memory, per direction
    processors: int  # streaming multiprocessors: matmul tiles run in waves of so many


_GPUS = (
    Gpu("gb200", "GB200", 184.0, 2500, 8000, 900, 225, 148),
    Gpu("b200", "B200", 178.4, 2250, 8000, 900, _PCIE5, 148),
    Gpu("h200", "H200", 139.8, 989, 4800, 450, _PCIE5, 132),
    Gpu("h20", "H20", 95.6, 148, 4000, 450, _PCIE5, 78),
    Gpu("h100_pcie", "H100 PCIe", 79.1, 756, 2000, _PCIE5, _PCIE5, 114),
    Gpu("h100_nvl", "H100 NVL", 93.1, 835, 3900, 300, _PCIE5, 132),
    Gpu("h100", "H100", 79.1, 989, 3350, 450, _PCIE5, 132),
    Gpu("a100_80", "A100", 79.2, 312, 2039, 300, _PCIE4, 108),
    Gpu("a100_40", "A100", 39.4, 312, 1555, 300, _PCIE4, 108),
    Gpu("mi300x", "MI300X", 191.7, 1307, 5300, 448, _PCIE5, 304),
    Gpu("l40s", "L40S", 44.4, 362, 864, _PCIE4, _PCIE4, 142),
    Gpu("l4", "L4", 22.0, 121, 300, _PCIE4, _PCIE4, 58),
    Gpu("a10g", "A10G", 22.1, 70, 600, _PCIE4, _PCIE4, 80),
    Gpu("rtx_6000_ada", "RTX 6000 Ada", 47.5, 364, 960, _PCIE4, _PCIE4, 142),
    Gpu("a6000", "RTX A6000", 47.5, 155, 768, _PCIE4, _PCIE4, 84),
    Gpu("rtx_5090", "RTX 5090", 31.3, 209, 1792, _PCIE5, _PCIE5, 170),
    Gpu("rtx_4090", "RTX 4090", 23.6, 165, 1008, _PCIE4, _PCIE4, 128),
    Gpu("rtx_3090", "RTX 3090", 23.6, 71, 936, _PCIE4, _PCIE4, 82),
    # A few cores of a host, to try a plan out on nodes without GPUs; rough.
    Gpu("cpu", "cpu", 64.0, 0.5, 50, 10, 50, 1),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}

_NO_BF16 = (
    "has no bfloat16, in which plans are made and the trainer uses GPUs; the oldest kind with it is a100_40"
)
_REFUSED = {
    "a100": "there are two kinds of A100: say a100_40 or a100_80, for its GB of memory",
    "v100": f"a V100 {_NO_BF16}",
    "t4": f"a T4 {_NO_BF16}",
}
_OWN_KIND = "NAME:GiB:TFLOPs:GBps[:linkGBps]"


def gpu_named(name: str) -> Gpu:
    """The kind of GPU called `name` (`RTX 4090`, `rtx-4090` and `4090` are the same one), or described as
    `NAME:GiB:TFLOPs:GBps[:linkGBps]`. ValueError, with the nearest names, for any other."""
    if ":" in name:
        return _described(name)
    known = {_plain(gpu): gpu for gpu in GPUS}
    plain = _plain(name)
    if plain in known:
        return GPUS[known[plain]]
    if plain in _REFUSED:
        raise ValueError(f"--gpu {name}: {_REFUSED[plain]}")
    close = difflib.get_close_matches(plain, known, n=3)
    hint = f"; did you mean {' or '.join(repr(known[found]) for found in close)}?" if close else "."
    raise ValueError(
        f"unknown GPU {name!r}{hint} Known: {', '.join(sorted(GPUS))}, and any other as {_OWN_KIND}"
    )


def _plain(name: str) -> str:
    """A name without the parts that people write or leave out."""
    return re.sub(r"[^a-z0-9]|rtx|nvidia|geforce|sxm\d?|(?<=\d)gb$", "", name.lower())


def _described(text: str) -> Gpu:
    """A kind of GPU that is not in the table. Its matmul tiles are taken to fill every wave."""
    name, *numbers = text.split(":")
    if not name or len(numbers) not in (3, 4):
        raise ValueError(
            f"--gpu {text}: a kind of GPU is described as {_OWN_KIND} (memory, dense bf16 rate, memory "
            f"bandwidth, bandwidth to another GPU of the node, {_PCIE4:g} if left out)"
        )
    for number in numbers:
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) or not float(number):
            raise ValueError(f"--gpu {text}: {number!r} is no positive number; write {_OWN_KIND}")
    memory, tflops, bandwidth, link = [*map(float, numbers), _PCIE4][:4]
    return Gpu(name, name, memory, tflops, bandwidth, link, _PCIE4, 1)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that CUDA calls `device`; None if it is not in the table."""
    gpu = gpu_of_device(device)
    return gpu.tflops * 1e12 if gpu else None


def gpu_of_device(device: str) -> Gpu | None:
    """The GPU that CUDA calls `device`; None if it is not in the table. Of two with one name the larger."""
    for gpu in _GPUS:  # the longer name comes first
        if re.search(rf"\b{gpu.device}\b(?! (D|Laptop|Max-Q)\b)", device):
            return gpu
    return None
