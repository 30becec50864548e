"""Search for the best way to run a model on a cluster: every choice is costed, and each but the best says why
it loses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megavit.fields import nearest
from megavit.gpus import GPUS
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import train_flops
from megavit.scale.gathers import GatherLimits
from megavit.scale.inventory import inventory
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.memory import Memory, predict_memory
from megavit.scale.roofline import Cluster, StepTime, predict_step
from megavit.train.config import RunConfig

_RUNTIME_GIB = 2.0  # CUDA context, NCCL's buffers, cuBLAS's workspaces
_FRAGMENTATION = 1.05  # of the allocator's peak
_MAX_MICRO_BATCH = 512
_MIN_BUCKET = 20_000_000  # elements: smaller messages do not fill a link
_GIB = 2**30
_SEARCHED_GPUS = 1024  # how far to look for a number of GPUs that is enough


@dataclass(frozen=True)
class Only:
    """What a search is restricted to; None is free."""

    tp: int | None = None
    stage: int | None = None
    recompute: Recompute | None = None
    offload: bool | None = None
    micro_batch: int | None = None

    @staticmethod
    def parse(text: str) -> Only:
        """`tp=8,stage=3,...`. ValueError for anything else."""
        known = [field.name for field in fields(Only)]
        found: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.strip().partition("=")
            if key not in known:
                raise ValueError(f"--only: unknown {key!r}{nearest(key, known)}; known: {', '.join(known)}")
            choices: dict[str, dict[str, Any]] = {
                "recompute": {name: name for name in ("none", "selective", "full")},
                "offload": {"true": True, "false": False},
                "stage": {"2": 2, "3": 3},
            }
            if key in choices and value not in choices[key]:
                raise ValueError(f"--only: {key} must be {' or '.join(choices[key])}, got {value!r}")
            if key not in choices and not (value.isdecimal() and int(value)):
                raise ValueError(f"--only: {key} must be a whole number of at least 1, got {value!r}")
            found[key] = choices[key][value] if key in choices else int(value)
        return Only(**found)

    def allows(self, **choice: Any) -> bool:
        return all(getattr(self, key) in (None, value) for key, value in choice.items())


@dataclass(frozen=True)
class Plan:
    """One way to run a job, and what it costs."""

    model: ModelConfig
    recompute: Recompute
    layout: Layout
    zero: ZeroSettings
    cluster: Cluster
    memory: Memory
    step: StepTime

    @property
    def needed_gib(self) -> float:
        """GPU memory, with what the runtime and fragmentation take."""
        return self.memory.peak_bytes / _GIB * _FRAGMENTATION + _RUNTIME_GIB

    @property
    def needed_host_gib(self) -> float:
        """A node's host memory for offloaded states."""
        return self.memory.host_bytes / _GIB * self.cluster.gpus_per_node

    @property
    def missing_gib(self) -> float:
        """GPU memory that is lacking; negative is room."""
        return self.needed_gib - self.cluster.gpu.memory_gib

    @property
    def fits(self) -> bool:
        return self.missing_gib <= 0 and self.needed_host_gib <= 0.9 * self.cluster.host_gib

    @property
    def images_per_s(self) -> float:
        return self.layout.global_batch / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, of the GPUs' nominal rate; recomputation does not count."""
        rate = self.images_per_s * train_flops(self.model)
        return rate / (self.cluster.gpus * self.cluster.gpu.tflops * 1e12)

    @property
    def name(self) -> str:
        offload = " offload" if self.zero.offload_optimizer else ""
        return f"ZeRO-{self.zero.stage} tp {self.layout.tp_size} {self.recompute}{offload}"

    def days(self, steps: int) -> float:
        return steps * self.step.total / 86_400

    def gpu_hours(self, steps: int) -> float:
        return steps * self.step.total / 3600 * self.cluster.gpus


def search(run: RunConfig, global_batch: int, cluster: Cluster, only: Only = Only()) -> list[Plan]:
    """The best plan of each (stage, tp, recompute, offload) that `only` allows, fastest first, those that do
    not fit last. In bfloat16.

    A plan that fits has the micro-batch with the shortest step, one that does not the smallest. ValueError
    when no layout is possible at all.
    """
    plans = [
        best
        for tp_size in tp_sizes(run.model, cluster)
        for zero in _settings(run.model, tp_size)
        for recompute in _policies(run.model)
        if only.allows(tp=tp_size, stage=zero.stage, recompute=recompute, offload=zero.offload_optimizer)
        if (best := _best(run.model, recompute, tp_size, zero, global_batch, cluster, only))
    ]
    if not plans:
        raise ValueError(_nothing_possible(run.model, global_batch, cluster))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step.total if plan.fits else plan.missing_gib))


def _nothing_possible(model: ModelConfig, global_batch: int, cluster: Cluster) -> str:
    sizes = tp_sizes(model, cluster)
    multiple = max(1, round(global_batch / cluster.gpus)) * cluster.gpus
    return (
        f"no layout is possible: TP sizes are {sizes} with this model and {cluster.gpus_per_node} "
        f"GPUs a node, and the data-parallel ranks (times --only's micro_batch) must divide the global batch "
        f"of {global_batch}; {multiple} would do for every layout"
    )


def tp_sizes(model: ModelConfig, cluster: Cluster) -> list[int]:
    """TP sizes that divide heads, MLP width and a node."""
    limit = min(cluster.gpus_per_node, model.num_heads)
    return [
        t
        for t in range(1, limit + 1)
        if model.num_heads % t == 0 and model.mlp_dim % t == 0 and cluster.gpus_per_node % t == 0
    ]


def _policies(model: ModelConfig) -> list[Recompute]:
    return ["none", "selective", "full"] if model.block == "parallel" else ["none", "full"]


def _settings(model: ModelConfig, tp_size: int) -> Iterator[ZeroSettings]:
    tree = inventory(model, tp_size)
    block = max(unit.numel() for unit in tree.children)
    bucket = max(_MIN_BUCKET, block)
    # One block ahead: a prefetch bucket that a block just overflows takes that block, no second one.
    # DeepSpeed keeps a gather's buffer until its last weight is used: what is prefetched counts twice.
    limits = GatherLimits(
        persistence=100_000,
        prefetch=max(_MIN_BUCKET, int(0.9 * block)),
        max_live=3 * bucket,
        max_reuse=bucket,
    )
    for stage in (2, 3):
        for offload in (False, True):
            yield ZeroSettings(stage, True, limits, bucket, offload_optimizer=offload)


def _best(
    model: ModelConfig,
    recompute: Recompute,
    tp_size: int,
    zero: ZeroSettings,
    global_batch: int,
    cluster: Cluster,
    only: Only,
) -> Plan | None:
    dp_size = cluster.gpus // tp_size
    if global_batch % dp_size:
        return None
    share = global_batch // dp_size
    found = []
    for micro_batch in (n for n in range(1, min(share, _MAX_MICRO_BATCH) + 1) if share % n == 0):
        if not only.allows(micro_batch=micro_batch):
            continue
        layout = Layout(tp_size, dp_size, micro_batch, share // micro_batch)
        plan = make_plan(model, recompute, layout, zero, cluster)
        found.append(plan)
        if not plan.fits:
            break
    fitting = [plan for plan in found if plan.fits]
    # Of equals (when decoding is the limit) the one with fewer micro-steps.
    return min(
        fitting or found[:1],
        key=lambda plan: (round(plan.step.total, 9), plan.layout.grad_accum),
        default=None,
    )


def make_plan(
    model: ModelConfig, recompute: Recompute, layout: Layout, zero: ZeroSettings, cluster: Cluster
) -> Plan:
    memory = predict_memory(model, recompute, layout, zero)
    step = predict_step(model, recompute, layout, zero, cluster)
    return Plan(model, recompute, layout, zero, cluster, memory, step)


# What a larger part of a step, or a missing piece of memory, is called in a reason.
_PARTS = {
    "matmuls": "smaller matmuls, which fill the GPU less",
    "attention": "attention",
    "elementwise": "more memory traffic",
    "recomputation": "recomputation",
    "waiting_for_launches": "blocks too small for the time to launch them",
    "tensor_parallel": "tensor-parallel all-reduces",
    "sharding": "ZeRO's gathers and reductions that compute cannot hide",
    "update": "the optimizer",
    "data": "decoding images",
}


def reason(plan: Plan, best: Plan) -> str:
    """Why `plan` loses against `best`."""
    if plan.missing_gib > 0:
        largest = max({**plan.memory.persistent, **plan.memory.transient}.items(), key=lambda item: item[1])
        return f"does not fit: {plan.missing_gib:.0f} GiB too much ({largest[0]} {largest[1] / _GIB:.0f} GiB)"
    if not plan.fits:
        return f"does not fit: {plan.needed_host_gib:.0f} GiB of host memory a node"
    if plan is best:
        return "best"
    slower = plan.step.total / best.step.total - 1
    if slower < 5e-4:
        return "as fast"
    mine, theirs = plan.step.parts(), best.step.parts()
    part = max(mine, key=lambda name: mine[name] - theirs[name])
    return f"{slower:.1%} slower: {_PARTS[part]} (+{(mine[part] - theirs[part]) / best.step.total:.1%})"


def advice(run: RunConfig, global_batch: int, cluster: Cluster, plans: list[Plan]) -> list[str]:
    """What would make the job fit without offloading: more GPUs, or larger ones."""
    closest = min(
        (plan for plan in plans if not plan.zero.offload_optimizer), key=lambda p: p.missing_gib, default=None
    )
    if closest is None or closest.fits:
        return []
    lines = [
        f"without offloading the least is {closest.needed_gib:.1f} GiB ({closest.name}, micro-batch "
        f"{closest.layout.micro_batch}), {closest.missing_gib:.1f} GiB more than one {cluster.gpu.name} has"
    ]
    for nodes in _more_nodes(cluster):
        if _fits_without_offload(run, global_batch, replace(cluster, nodes=nodes)):
            lines.append(f"it fits on {nodes} such nodes ({nodes * cluster.gpus_per_node} GPUs)")
            break
    larger = [
        gpu.name
        for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_gib)
        if gpu.memory_gib > cluster.gpu.memory_gib
        and _fits_without_offload(run, global_batch, replace(cluster, gpu=gpu))
    ]
    if larger:
        lines.append(f"or on as many of: {', '.join(larger)}")
    return lines


def _more_nodes(cluster: Cluster) -> Iterator[int]:
    nodes = cluster.nodes * 2
    while nodes * cluster.gpus_per_node <= _SEARCHED_GPUS:
        yield nodes
        nodes *= 2


def _fits_without_offload(run: RunConfig, global_batch: int, cluster: Cluster) -> bool:
    try:
        plans = search(run, global_batch, cluster)
    except ValueError:
        return False
    return any(plan.fits and not plan.zero.offload_optimizer for plan in plans)


def scaling(
    run: RunConfig, global_batch: int, cluster: Cluster, gpus: list[int], only: Only = Only()
) -> list[Plan | None]:
    """The best plan at each number of GPUs (whole nodes, or part of one); None where nothing fits."""
    found: list[Plan | None] = []
    for count in gpus:
        per_node = min(count, cluster.gpus_per_node)
        part = replace(cluster, nodes=math.ceil(count / per_node), gpus_per_node=per_node)
        try:
            best = search(run, global_batch, part, only)[0]
        except ValueError:
            found.append(None)
            continue
        found.append(best if best.fits else None)
    return found
