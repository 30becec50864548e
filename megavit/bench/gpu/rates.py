"""The planner's rates, measured on this card, and what it then predicts for the blocks beside their time.

Each case adds its rate to the file that `launch/plan.py --rates` reads. Rates of links between GPUs, of
collectives, of Adam on a host and of decoding are not measured here: one GPU does not show them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

import torch
import torch.nn.functional as F

from megavit.bench.gpu.block import Way, make_blocks, matmul_rate, step_of
from megavit.bench.gpu.matmul import sustained_rate
from megavit.bench.gpu.rehearse import gpu_here
from megavit.bench.gpu.setting import Setting, blocks_of
from megavit.bench.gpu.stage import Case, Unavailable
from megavit.bench.kernels import time_by_kind
from megavit.bench.report import Row, machine_name, versions
from megavit.bench.rounds import kernel_s, median_s
from megavit.scale.rates import Rates, wave_share, write_rates

_NARROW = (256, 4, 2, 4)  # width, blocks, heads, side: so little work that a GPU waits for every launch


@dataclass
class _Found:
    """The card's rates so far, and the file in which they stand."""

    setting: Setting
    rates: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, measure: Callable[[Setting, Rates], float]) -> Row:
        gpu, so_far = gpu_here(self.setting), self.so_far()
        value = measure(self.setting, so_far)
        self.rates[name] = value
        file = self.setting.out / f"rates_{gpu.name}.json"
        date = datetime.now(UTC).date().isoformat()
        write_rates(file, gpu.name, machine_name(self.setting.device), date, versions(), self.rates)
        assumed = getattr(Rates(), name)
        return {"value": value, "assumed": assumed, "value/assumed": value / assumed, "file": file.name}

    def so_far(self) -> Rates:
        return replace(Rates(), **self.rates)  # type: ignore[arg-type]


def cases(setting: Setting) -> Iterator[Case]:
    found = _Found(setting)
    for name, measure in _MEASURES.items():
        yield Case({"rate": name}, partial(found.add, name, measure))
    for micro_batch in setting.micro_batches:
        names = {"rate": "a block's time", "micro_batch": micro_batch}
        yield Case(names, partial(_prediction, setting, found, micro_batch))


def _matmul_share(setting: Setting, so_far: Rates) -> float:
    """Beyond what tiles that do not fill the last wave cost, which the planner counts by itself."""
    gpu, micro_batch = gpu_here(setting), setting.micro_batches[0]
    waves = wave_share(setting.block, micro_batch, 1, gpu)
    return matmul_rate(setting, micro_batch) / (gpu.tflops * 1e12 * waves)


def _sustained_share(setting: Setting, so_far: Rates) -> float:
    """Of clocks alone: with one GPU no communication takes processors."""
    return sustained_rate(setting) / matmul_rate(setting, setting.micro_batches[0])


def _attention_share(setting: Setting, so_far: Rates) -> float:
    config, batch = setting.block, setting.micro_batches[0]
    shape = (batch, config.num_heads, config.num_tokens, config.head_dim)
    q, k, v = (
        torch.randn(shape, device=setting.device, dtype=setting.dtype).requires_grad_() for _ in range(3)
    )
    grad = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

    flops = 3 * 4 * batch * config.num_tokens**2 * config.dim
    return flops / kernel_s(both, setting.kernel_s, setting.device) / (gpu_here(setting).tflops * 1e12)


def _memory_share(setting: Setting, so_far: Rates) -> float:
    """Of a copy, its reads and writes."""
    source = torch.randn(setting.stream, device=setting.device, dtype=setting.dtype)
    target = torch.empty_like(source)
    seconds = kernel_s(lambda: target.copy_(source), setting.kernel_s, setting.device)
    return 2 * source.nbytes / seconds / (gpu_here(setting).memory_gb_per_s * 1e9)


def _elementwise_traffic(setting: Setting, so_far: Rates) -> float:
    """All of an eager block but matmuls and attention, over what the planner's count of tensors gives."""
    config, micro_batch = setting.block, setting.micro_batches[0]
    forward, blocks = make_blocks(setting, config, Way(micro_batch))
    times = time_by_kind(step_of(forward, blocks), setting.device)
    measured_ms = sum(
        value
        for name, value in times.items()
        if name.endswith("_ms") and name not in ("matmul_ms", "attention_ms")
    )
    counted = _predicted(setting, replace(so_far, elementwise_traffic=1.0), micro_batch, "elementwise")
    return measured_ms / 1e3 / counted


def _kernels(setting: Setting, so_far: Rates) -> float:
    forward, blocks = make_blocks(setting, setting.block, Way(setting.micro_batches[-1]))
    kernels: int = time_by_kind(step_of(forward, blocks), setting.device)["kernels"]
    return kernels / setting.block.depth


def _kernel_s(setting: Setting, so_far: Rates) -> float:
    """From narrow blocks, whose kernels take less time than their launches."""
    narrow = blocks_of(*_NARROW)
    step = step_of(*make_blocks(setting, narrow, Way(1)))
    seconds = median_s(step, setting.steps, setting.device)
    return seconds / (narrow.depth * so_far.kernels)


def _update_bytes(setting: Setting, so_far: Rates) -> float:
    """Fused Adam on float32 master weights, and their copy in bfloat16; in units of the memory's rate."""
    weight = torch.nn.Parameter(torch.randn(setting.stream, device=setting.device))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    rounded = torch.empty_like(weight, dtype=setting.dtype)

    def update() -> None:
        optimizer.step()
        rounded.copy_(weight.detach())

    seconds = kernel_s(update, setting.kernel_s, setting.device)
    rate = gpu_here(setting).memory_gb_per_s * 1e9 * so_far.memory_share
    return seconds * rate / setting.stream


def _host_link_share(setting: Setting, so_far: Rates) -> float:
    """Of copies to and from pinned memory, one after the other."""
    if setting.device != "cuda":
        raise Unavailable("a CPU has no link to its host")
    here = torch.randn(setting.stream, device=setting.device, dtype=setting.dtype)
    there = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)

    def both() -> None:
        there.copy_(here, non_blocking=True)
        here.copy_(there, non_blocking=True)

    seconds = kernel_s(both, setting.kernel_s, setting.device)
    return 2 * here.nbytes / seconds / (gpu_here(setting).host_gb_per_s * 1e9)


# In this order: a later one may rest on an earlier one.
_MEASURES: dict[str, Callable[[Setting, Rates], float]] = {
    "matmul_share": _matmul_share,
    "memory_share": _memory_share,
    "attention_share": _attention_share,
    "sustained_share": _sustained_share,
    "elementwise_traffic": _elementwise_traffic,
    "kernels": _kernels,
    "kernel_s": _kernel_s,
    "update_bytes": _update_bytes,
    "host_link_share": _host_link_share,
}


def _prediction(setting: Setting, found: _Found, micro_batch: int) -> Row:
    """Forward and backward of one block, eager, nothing recomputed: with the measured and with the assumed
    rates, beside its time. Not what the rates were made from, but for elementwise_traffic."""
    step = step_of(*make_blocks(setting, setting.block, Way(micro_batch)))
    measured = median_s(step, setting.steps, setting.device)
    now, before = (_predicted(setting, rates, micro_batch) for rates in (found.so_far(), Rates()))
    depth = setting.block.depth
    return {
        "measured_ms": measured / depth * 1e3,
        "predicted_ms": now / depth * 1e3,
        "predicted/measured": now / measured,
        "with_assumed_rates_ms": before / depth * 1e3,
        "assumed/measured": before / measured,
    }


def _predicted(setting: Setting, rates: Rates, micro_batch: int, part: str = "") -> float:
    """Seconds of the blocks of `setting.block`, or a part of them: twice as many blocks less so many, so that
    embedding and head do not count."""
    from megavit.scale.cluster import Cluster
    from megavit.scale.job import Layout, ZeroSettings
    from megavit.scale.roofline import predict_step

    cluster = Cluster(gpu_here(setting), 1, 1, rates=rates)

    def seconds(depth: int) -> float:
        model = replace(setting.block, depth=depth)
        step = predict_step(model, "none", Layout(1, 1, micro_batch), ZeroSettings(3, True), cluster)
        compute = step.matmuls + step.attention + step.elementwise + step.waiting_for_launches
        return getattr(step, part) if part else compute

    depth = setting.block.depth
    return seconds(2 * depth) - seconds(depth)
