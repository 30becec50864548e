"""Search for the best way to run a model on a cluster: every choice is costed, and each but the best says why
it loses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megavit.gpus import GPUS
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import train_flops
from megavit.scale.choices import ANYTHING, Only, layouts, policies, require_choice
from megavit.scale.cluster import Cluster
from megavit.scale.gathers import GatherLimits
from megavit.scale.job import OFFLOADS, Layout, ZeroSettings
from megavit.scale.memory import Memory, predict_memory
from megavit.scale.program import program
from megavit.scale.roofline import StepTime, predict_step
from megavit.tasks.config import ClassifyConfig, TaskConfig
from megavit.train.config import RunConfig

RUNTIME_GIB = 2.0  # CUDA context, NCCL's buffers, cuBLAS's workspaces
FRAGMENTATION = 1.05  # of the allocator's peak
_MIN_BUCKET = 20_000_000  # elements: smaller messages do not fill a link
_GIB = 2**30
_SEARCHED_GPUS = 1024  # how far to look for a number of GPUs that is enough


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
    freeze: str = ""
    task: TaskConfig | None = None

    @property
    def needed_gib(self) -> float:
        """GPU memory, with what the runtime and fragmentation take."""
        return self.memory.peak_bytes / _GIB * FRAGMENTATION + RUNTIME_GIB

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
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, of the GPUs' nominal rate; recomputation does not count. None when parts
        are frozen and for other tasks than classification: their step has no agreed number of FLOPs."""
        if self.freeze or (self.task and self.task.name != ClassifyConfig.name):
            return None
        rate = self.images_per_s * train_flops(self.model)
        return rate / (self.cluster.gpus * self.cluster.gpu.tflops * 1e12)

    @property
    def name(self) -> str:
        """Stage, TP size, what is recomputed and what is offloaded, in the words of `--only`."""
        offload = "" if self.zero.offload == "none" else f" offload {self.zero.offload}"
        return f"ZeRO-{self.zero.stage} tp {self.layout.tp_size} {self.recompute}{offload}"

    def days(self, steps: int) -> float:
        return steps * self.step.total / 86_400

    def gpu_hours(self, steps: int) -> float:
        return steps * self.step.total / 3600 * self.cluster.gpus


def search(run: RunConfig, global_batch: int, cluster: Cluster, only: Only = ANYTHING) -> list[Plan]:
    """The best plan of each (stage, tp, recompute, offload) that `only` allows, fastest first, those that do
    not fit last. In bfloat16.

    A plan that fits has the micro-batch with the shortest step, one that does not the smallest. ValueError
    when no layout is possible at all.
    """
    require_choice(run.model, global_batch, cluster, only)
    refused: ValueError | None = None
    possible = []
    for tp_size, candidates in layouts(run.model, global_batch, cluster, only):
        try:
            program(run.model, tp_size, run.freeze, run.task)
            possible.append((tp_size, candidates))
        except ValueError as error:  # of the task: its head may not have as many attention heads
            refused = error
    if refused and not possible:
        raise refused
    plans = [
        _best(run, recompute, zero, candidates, cluster)
        for tp_size, candidates in possible
        for zero in _settings(run, tp_size)
        for recompute in policies(run.model)
        if only.allows(stage=zero.stage, recompute=recompute, offload=zero.offload)
    ]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step.total if plan.fits else plan.missing_gib))


def _settings(run: RunConfig, tp_size: int) -> Iterator[ZeroSettings]:
    tree = program(run.model, tp_size, run.freeze, run.task).tree
    block, reduced = (max(unit.numel() for unit in part.children) for part in (tree, tree.trained_part()))
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
        for offload in OFFLOADS if stage == 3 else OFFLOADS[:2]:
            yield ZeroSettings(
                stage,
                True,
                limits,
                max(_MIN_BUCKET, reduced),
                offload_optimizer=offload != "none",
                offload_param=offload == "params",
            )


def _best(
    run: RunConfig, recompute: Recompute, zero: ZeroSettings, candidates: list[Layout], cluster: Cluster
) -> Plan:
    """The fastest layout that fits, else the one with the smallest micro-batch."""
    found = []
    for layout in candidates:
        plan = make_plan(run.model, recompute, layout, zero, cluster, run.freeze, run.task)
        found.append(plan)
        if not plan.fits:
            break
    fitting = [plan for plan in found if plan.fits]
    # Of equals (when decoding is the limit) the one with fewer micro-steps.
    return min(
        fitting or found[:1],
        key=lambda plan: (round(plan.step.total, 9), plan.layout.grad_accum),
    )


def make_plan(
    model: ModelConfig,
    recompute: Recompute,
    layout: Layout,
    zero: ZeroSettings,
    cluster: Cluster,
    freeze: str = "",
    task: TaskConfig | None = None,
) -> Plan:
    memory = predict_memory(model, recompute, layout, zero, freeze, task)
    step = predict_step(model, recompute, layout, zero, cluster, freeze, task)
    return Plan(model, recompute, layout, zero, cluster, memory, step, freeze, task)


# What a larger part of a step, or a missing piece of memory, is called in a reason.
_PARTS = {
    "matmuls": "smaller matmuls, which fill the GPU less",
    "attention": "attention",
    "elementwise": "more memory traffic of norms, GELU and sums",
    "recomputation": "recomputation",
    "waiting_for_launches": "blocks too small for the time to launch them",
    "tensor_parallel": "tensor-parallel all-reduces",
    "sharding": "ZeRO's gathers and reductions that compute cannot hide",
    "update": "the optimizer",
    "host_copies": "copies between GPU and host memory",
    "data": "decoding images",
}


def reason(plan: Plan, best: Plan) -> str:
    """Why `plan` loses against `best`."""
    if plan.missing_gib > 0:
        largest = max({**plan.memory.persistent, **plan.memory.transient}.items(), key=lambda item: item[1])
        return f"does not fit: {plan.missing_gib:.0f} GiB too much ({largest[0]} {largest[1] / _GIB:.0f} GiB)"
    if not plan.fits:
        host = plan.cluster.host_gib
        return f"does not fit: needs {plan.needed_host_gib:.0f} GiB of host memory a node, which has {host:g}"
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
        f"without offloading, the smallest plan ({closest.name}, micro-batch {closest.layout.micro_batch}) "
        f"needs {closest.needed_gib:.1f} GiB, {closest.missing_gib:.1f} GiB more than one "
        f"{cluster.gpu.name} has"
    ]
    for nodes in _more_nodes(cluster):
        if _fits_without_offload(run, global_batch, replace(cluster, nodes=nodes)):
            gpus = nodes * cluster.gpus_per_node
            lines.append(f"it would fit without offloading on {nodes} such nodes ({gpus} GPUs)")
            break
    larger = [
        gpu.name
        for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_gib)
        if gpu.memory_gib > cluster.gpu.memory_gib
        and gpu.name != "cpu"
        and _fits_without_offload(run, global_batch, replace(cluster, gpu=gpu))
    ]
    if larger:
        lines.append(f"it would fit without offloading on the same number of {', '.join(larger)}")
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
    run: RunConfig, global_batch: int, cluster: Cluster, gpus: list[int], only: Only = ANYTHING
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
