"""One true rank of the plan for ViT-22B on 64 GPUs of this kind: the memory that it takes beside what the
planner says, and the time of its step, in which the other ranks' collectives take none. And, where the host
has the memory, all of ViT-22B on this GPU alone, its optimizer in host memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case, Unavailable
from megavit.bench.gpu.whole import require_memory
from megavit.bench.report import Row
from megavit.gpus import GPUS, Gpu, gpu_of_device
from megavit.model.count import train_flops
from megavit.recipe import PROJECT_ROOT
from megavit.train.config import RunConfig
from megavit.train.ds_config import load_ds_config

if TYPE_CHECKING:
    from megavit.scale.search import Plan

_NODES, _GPUS_PER_NODE = 8, 8
_GLOBAL_BATCH = 65_536
_USABLE = 0.93  # of the memory that is free
_BASE = PROJECT_ROOT / "ds_configs/zero3_vit22b.json"
_TORCH_ADAM = {"optimizer.params.torch_adam": True, "optimizer.params.fused": True}
_STEPS = 3  # DeepSpeed learns the order of the modules in the first two


# A process can rehearse once, so each of the two is a stage.


def rank_cases(setting: Setting) -> Iterator[Case]:
    gpus = _NODES * _GPUS_PER_NODE
    yield Case({"model": setting.whole.name, "gpus": gpus}, partial(_rank, setting, gpus))


def offload_cases(setting: Setting) -> Iterator[Case]:
    yield Case({"model": setting.whole.name, "gpus": 1}, partial(_offloaded, setting))


def _rank(setting: Setting, gpus: int) -> Row:
    return measured_beside_plan(setting, plan_for(setting, gpus, "stage=3,tp=1,offload=none"), _STEPS)


def _offloaded(setting: Setting) -> Row:
    plan = plan_for(setting, 1, "stage=3,tp=1,recompute=selective,offload=optimizer")
    needed, free = plan.memory.host_bytes, free_host_bytes()
    if needed > free:
        raise Unavailable(
            f"does not fit: master weights, moments and gradients take {needed / 1e9:.1f} GB of host memory, "
            f"and {free / 1e9:.1f} GB are free"
        )
    require_memory(setting, plan.memory.peak_bytes, "what stays on the GPU")
    return measured_beside_plan(setting, plan, _STEPS)


def free_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Unavailable("/proc/meminfo does not say how much host memory is free")


def gpu_here(setting: Setting) -> Gpu:
    """The planner's entry for the card. Unavailable for one that it does not know."""
    if setting.device == "cpu":
        return GPUS["cpu"]
    name = torch.cuda.get_device_name()
    found = gpu_of_device(name)
    if found is None:
        raise Unavailable(f"the planner's table of GPUs (megavit/gpus.py) does not know {name}")
    return found


def plan_for(setting: Setting, gpus: int, only: str) -> Plan:
    """The best plan for `setting.whole` on so many GPUs like this one, of those that `only` allows; its
    micro-batch is one step's whole work."""
    from megavit.scale.choices import Only
    from megavit.scale.cluster import Cluster
    from megavit.scale.search import search

    per_node = min(gpus, _GPUS_PER_NODE)
    cluster = Cluster(gpu_here(setting), gpus // per_node, per_node)
    best = search(_run(setting), _GLOBAL_BATCH, cluster, Only.parse(only))[0]
    if setting.dry:
        best = dataclasses.replace(best, layout=dataclasses.replace(best.layout, micro_batch=1))
    return dataclasses.replace(best, layout=dataclasses.replace(best.layout, grad_accum=1))


def _run(setting: Setting) -> RunConfig:
    from megavit.tasks.config import ClassifyConfig

    return RunConfig(model=setting.whole, task=ClassifyConfig(loss="sigmoid"))


def measured_beside_plan(setting: Setting, plan: Plan, steps: int) -> Row:
    """Rank 0 of the plan, here, with as many of its blocks as fit into the memory that is free."""
    if not importlib.util.find_spec("deepspeed"):
        raise Unavailable("DeepSpeed is not installed")
    from megavit.scale.rehearse import fitting_depth, predicted_memory, rehearse, with_depth
    from megavit.scale.report import planned_ds_config
    from megavit.scale.roofline import predict_step

    on_cpu = setting.device == "cpu"
    free_gib = 20.0 if on_cpu else torch.cuda.mem_get_info()[0] * _USABLE / 2**30
    cut = with_depth(plan, fitting_depth(plan, free_gib, on_cpu=on_cpu))
    layout, depth = plan.layout, cut.model.depth
    persistent, peak = predicted_memory(plan, depth, on_cpu=on_cpu)
    predicted = predict_step(cut.model, cut.recompute, layout, cut.zero, cut.cluster)
    alone_s = predicted.total - predicted.tensor_parallel - predicted.sharding - predicted.data
    run = dataclasses.replace(_run(setting), model=cut.model, recompute=plan.recompute)
    # torch's Adam, which need not be compiled first; for what is in host memory DeepSpeed's is the only one.
    adam = {} if cut.zero.offload_optimizer else _TORCH_ADAM
    ds_config = planned_ds_config(load_ds_config(_BASE, adam), cut) | {"bf16": {"enabled": True}}
    measured = rehearse(run, ds_config, layout.tp_size, layout.dp_size, steps)
    rate = layout.micro_batch * train_flops(cut.model) / layout.tp_size / measured.step_s
    return {
        "plan": plan.name,
        "micro_batch": layout.micro_batch,
        "blocks": f"{depth} of {plan.model.depth}",
        "persistent_gib": measured.persistent_bytes / 2**30,
        "persistent_predicted": persistent / measured.persistent_bytes,
        "peak_gib": measured.peak_bytes / 2**30,
        "peak_predicted": peak / measured.peak_bytes,
        "build_s": measured.build_s,
        "build_peak_gib": measured.build_peak_bytes / 2**30,
        "ms": measured.step_s * 1e3,
        "time_predicted": alone_s / measured.step_s,
        "tflop_per_s": rate / 1e12,
        "mfu": setting.of_peak(rate),
    }
