"""One true rank of a big job, on this machine: the production engine in a world whose other ranks do not
exist (their collectives move nothing). Memory and compute time are real, the numbers that come out are not.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megavit.parallel.mesh import Mesh
from megavit.scale.communication import step_traffic
from megavit.scale.counter import CollectiveCounter
from megavit.scale.memory import predict_memory
from megavit.scale.search import Plan
from megavit.tasks.task import blank_samples
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from megavit.train.engine import Engine

_SCALARS = 1024  # bytes: collectives of single numbers (loss, norm, flags) are not worth a line
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True)
class Rehearsal:
    """What one rank used, in bytes and seconds; the step's are of the last one.

    On a GPU memory is what PyTorch's allocator has handed out. On a CPU persistent memory is that of the
    tensors which are alive between two steps, and the peaks are the process's resident set above that before
    the engine was built: they include what the libraries keep for themselves, tens of megabytes that differ
    by machine.
    """

    build_s: float
    build_peak_bytes: int
    step_s: float
    persistent_bytes: int
    peak_bytes: int
    traffic: dict[tuple[str, int], int]


def rehearse(
    run: RunConfig, raw_ds_config: dict[str, Any], tp_size: int, dp_size: int, steps: int = 3
) -> Rehearsal:
    """Build rank 0 of the grid and take `steps` optimizer steps. Once a process: the fake process group
    cannot be replaced."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    mesh = Mesh.fake(tp_size, dp_size, device)
    meter = _CudaMeter() if device.type == "cuda" else _ResidentMeter()
    run = replace(run, tensor_parallel_size=tp_size)
    ds_config = resolve_ds_config(raw_ds_config, dp_size, device.type)
    meter.reset_peak()
    started = time.perf_counter()
    engine = Engine(run, ds_config, mesh)
    build_s, build_peak = time.perf_counter() - started, meter.peak()
    samples = blank_samples(engine.task, engine.micro_batch, device)
    inputs = [engine.task.inputs(samples, mesh, training=True)] * engine.grad_accum
    weight = torch.tensor(float(ds_config["train_batch_size"]), device=device)
    for _ in range(steps):
        meter.reset_peak()
        started = time.perf_counter()
        with CollectiveCounter() as counter:
            engine.train_step(inputs, weight, 1e-3, norm_limit=math.inf)
        peak = meter.peak()  # waits for the device
        step_s = time.perf_counter() - started
    del samples, inputs  # what stays has no batch in it
    return Rehearsal(build_s, build_peak, step_s, meter.now(), peak, dict(counter.bytes))


def with_depth(plan: Plan, depth: int) -> Plan:
    """The plan for a model of the first `depth` blocks; of what is frozen, the other blocks are left out."""
    names = [name.strip() for name in plan.freeze.split(",")]
    blocks = [re.match(r"trunk\.blocks\.(\d+)", name) for name in names]
    kept = [name for name, block in zip(names, blocks, strict=True) if not block or int(block[1]) < depth]
    return replace(plan, model=replace(plan.model, depth=depth), freeze=",".join(kept))


def fitting_depth(plan: Plan, limit_gib: float, *, on_cpu: bool) -> int:
    """The most blocks, up to the model's own, with which one rank's peak stays under the limit, host memory
    included. ValueError if not even one does."""

    def peak(depth: int) -> float:
        return predicted_memory(plan, depth, on_cpu=on_cpu)[1] / 2**30

    for depth in range(plan.model.depth, 0, -1):
        try:
            if peak(depth) <= limit_gib:
                return depth
        except ValueError as error:  # a head reads later blocks
            raise ValueError(f"--rehearse_gib {limit_gib:g} is too little: {error}") from error
    raise ValueError(
        f"one block needs {peak(1):.1f} GiB, more than --rehearse_gib {limit_gib:g}; lower "
        f"--rehearse_micro_batch, or shard over more ranks"
    )


def compare(plan: Plan, depth: int, measured: Rehearsal, *, on_cpu: bool) -> str:
    """The rehearsal with `depth` blocks beside the prediction for it, and the prediction for all blocks."""
    predicted, whole = (predicted_memory(plan, blocks, on_cpu=on_cpu) for blocks in (depth, plan.model.depth))
    cut = with_depth(plan, depth)
    traffic = step_traffic(cut.model, cut.recompute, cut.layout, cut.zero, cut.freeze, cut.task)
    layout = plan.layout
    lines = [
        f"rehearsal of rank 0 of {layout.ranks} ({plan.name}, dp {layout.dp_size}), {depth} of "
        f"{plan.model.depth} blocks, micro-batch {layout.micro_batch}, on a {'CPU' if on_cpu else 'GPU'}; "
        f"built in {measured.build_s:.1f} s with at most {measured.build_peak_bytes / 2**30:.2f} GiB, the "
        f"last step took {measured.step_s:.2f} s",
        "",
        "| of this rank | predicted | measured | predicted / measured | predicted with all "
        f"{plan.model.depth} blocks |",
        "|---|---|---|---|---|",
    ]
    names, found = ("persistent", "peak"), (measured.persistent_bytes, measured.peak_bytes)
    for name, *sizes in zip(names, predicted, found, whole, strict=True):
        mine, theirs, all_blocks = (f"{size / 2**30:.2f} GiB" for size in sizes)
        lines.append(f"| {name} memory | {mine} | {theirs} | {sizes[0] / sizes[1]:.3f} | {all_blocks} |")
    for (kind, ranks), counted in sorted(measured.traffic.items()):
        guess = traffic.get((kind, ranks), 0)
        if ranks > 1 and counted >= _SCALARS:
            share = f"{guess / counted:.6f}"
            lines.append(f"| {kind} over {ranks} ranks | {guess:,} B | {counted:,} B | {share} | |")
    return "\n".join(lines)


def predicted_memory(plan: Plan, depth: int, *, on_cpu: bool) -> tuple[int, int]:
    """Bytes of (persistent memory, peak) with `depth` blocks; on a CPU the host's memory is the same one."""
    cut = with_depth(plan, depth)
    memory = predict_memory(
        cut.model, cut.recompute, cut.layout, cut.zero, cut.freeze, cut.task, on_cpu=on_cpu
    )
    host = memory.host_bytes if on_cpu else 0
    return memory.persistent_bytes + host, memory.peak_bytes + host


class _ResidentMeter:
    """Memory of this process above that at its construction: at the peak its resident set, without the pages
    of files (how many of a library's are mapped is chance); now that of its tensors."""

    def __init__(self) -> None:
        # glibc keeps freed memory for later: let it give back every piece of a megabyte at once.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        self._before = _status("RssAnon")
        self._tensors_before = _bytes_of_tensors()

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM") - _status("RssFile") - self._before

    def now(self) -> int:
        return _bytes_of_tensors() - self._tensors_before


class _CudaMeter:
    def reset_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def now(self) -> int:
        return torch.cuda.memory_allocated()


def _bytes_of_tensors() -> int:
    """Size of the storages of all tensors on the CPU that Python knows of, and of their gradients."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.is_cpu]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)
