"""How long an optimizer step takes on a cluster, predicted part by part.

Compute follows from FLOPs and bytes, communication from the bytes of `communication.py` and the slowest link
on their way, and what can overlap does. The shares of nominal rates (`rates.py`) are assumptions, unless they
have been measured on a card: trust differences between plans more than the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import block_matrices, forward_flops, repeated_flops, train_flops
from megavit.scale.cluster import Cluster
from megavit.scale.communication import tp_bytes
from megavit.scale.inventory import Unit
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.program import Program, program
from megavit.scale.rates import wave_share
from megavit.tasks.config import TaskConfig


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Communication is what cannot be hidden, and the price of hiding."""

    matmuls: float
    attention: float
    elementwise: float
    recomputation: float
    waiting_for_launches: float
    tensor_parallel: float
    sharding: float
    update: float
    host_copies: float
    data: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def predict_step(
    model: ModelConfig,
    recompute: Recompute,
    layout: Layout,
    zero: ZeroSettings,
    cluster: Cluster,
    freeze: str = "",
    task: TaskConfig | None = None,
) -> StepTime:
    """Time of an optimizer step of `layout` on `cluster`, in the steady state; no `task` is `classify`."""
    job = program(model, layout.tp_size, freeze, task, zero.bf16)
    passes = _Passes(model, recompute, layout, cluster, job)
    times = layout.grad_accum
    tensor_parallel = _tensor_parallel_s(model, recompute, layout, zero, cluster, passes)
    sharding, update = _data_parallel_s(layout, zero, cluster, passes)
    compute = passes.forward_s + passes.backward_s
    images = layout.micro_batch * times
    decoded = images / layout.tp_size / (cluster.cores_per_gpu * cluster.rates.decode_per_core_s)
    host_copies = _host_copies_s(job, layout, zero, cluster)
    busy = times * (compute + tensor_parallel) + sharding + update + host_copies
    return StepTime(
        matmuls=times * passes.matmuls_s,
        attention=times * passes.attention_s,
        elementwise=times * passes.elementwise_s,
        recomputation=times * passes.recomputation_s,
        waiting_for_launches=times * passes.launches_s,
        tensor_parallel=times * tensor_parallel,
        sharding=sharding,
        update=update,
        host_copies=host_copies,
        data=max(0.0, decoded - busy),
    )


class _Work:
    """What of a whole backward pass is left to do when parts are frozen: the shares of the matmuls' FLOPs
    that give the gradients of inputs (`inputs`) and of weights (`weights`), and of the blocks (`blocks`).
    What is traced does not count."""

    def __init__(self, model: ModelConfig, job: Program):
        self._tokens = model.num_tokens
        blocks = job.blocks()
        tree = replace(job.tree, children=tuple(blocks)) if job.traces else job.tree
        whole = self._flops(tree, ())
        self.inputs, self.weights = (self._flops(tree, (), part) / whole for part in ("inputs", "weights"))
        self.blocks = sum(block.has_backward for block in blocks) / len(blocks)

    def _flops(self, unit: Unit, path: tuple[str, ...], part: str = "") -> int:
        """Of a forward pass, in units of 2 FLOPs an image; pooling and classifier see one token."""
        sees_all = path[:1] in (("embed",), ("blocks",)) or unit.is_block or path == ("pool", "kv")
        own = unit.trained if part == "weights" else unit.sizes
        done = part != "inputs" or unit.has_backward
        below = sum(self._flops(child, (*path, child.name), part) for child in unit.children)
        return sum(own) * done * (self._tokens if sees_all else 1) + below


class _Passes:
    """Compute of one micro-step on one rank, in seconds: of the trunk's blocks, and of all else, by formulas
    or as it was traced."""

    def __init__(
        self, model: ModelConfig, recompute: Recompute, layout: Layout, cluster: Cluster, job: Program
    ):
        self.job = job
        self.work = work = _Work(model, job)
        traced = job.numbers(layout.micro_batch)
        gpu, rates, t, batch = cluster.gpu, cluster.rates, layout.tp_size, layout.micro_batch
        rate = gpu.tflops * 1e12 * rates.sustained_share
        self.num_blocks = depth = len(job.blocks())
        attention_flops = 3 * 4 * model.num_tokens**2 * model.dim * depth * batch / t
        matmul_flops = train_flops(model) * batch / t - attention_flops
        if job.traces:
            matmul_flops = 3 * 2 * model.num_tokens * block_matrices(model) / model.depth * depth * batch / t
        share = rates.matmul_share * wave_share(model, layout.micro_batch, t, gpu)
        # Forward, gradients of inputs, gradients of weights: a third each. Attention has no weights.
        matmuls_s = matmul_flops / (rate * share)
        attention_s = attention_flops / (rate * rates.attention_share)
        self.matmul_pass_s = matmuls_s / 3
        outside_s = [traced["flops", backward] / (rate * rates.matmul_share) for backward in (False, True)]
        self.matmuls_s = matmuls_s * ((1 + work.inputs + work.weights) / 3) + sum(outside_s)
        self.attention_s = attention_s * ((1 + 2 * work.blocks) / 3)
        bytes_per_s = gpu.memory_gb_per_s * 1e9 * rates.memory_share
        stream_s = batch * model.num_tokens * model.dim * 2 * rates.elementwise_traffic / bytes_per_s
        # Reads and writes of [B, N, D] tensors by norms, GELU, attention's layout and sums, counted by hand
        # (+-30%): forward 14 + 4 F/D, backward 18 + 5 F/D, most of it on a rank's own heads and hidden units.
        ratio = model.mlp_dim / model.dim
        forward = (6 + (8 + 4 * ratio) / t) * stream_s * depth
        backward = (8 + (10 + 5 * ratio) / t) * stream_s * depth * work.blocks
        forward_s = (matmuls_s + attention_s) / 3 + forward
        repeated_s = {
            "none": 0.0,
            "selective": (4 + (2 + 2 * ratio) / t) * stream_s * depth,
            "full": forward_s * repeated_flops(model) / forward_flops(model),
        }[recompute]
        moved_s = [traced["moved", backward] / bytes_per_s for backward in (False, True)]
        self.elementwise_s = forward + backward + sum(moved_s)
        forward_s += outside_s[0] + moved_s[0]
        self.recomputation_s = repeated_s * work.blocks
        backward_launches = 2 * work.blocks / (1 + 2 * work.blocks)
        kernels = rates.kernels * depth * (1 + 2 * work.blocks) / 3
        launches = rates.kernel_s * (kernels + traced["kernels", False] + traced["kernels", True])
        busy = self.matmuls_s + self.attention_s + self.elementwise_s + self.recomputation_s
        self.launches_s = max(0.0, launches - busy)
        self.forward_s = forward_s + self.launches_s * (1 - backward_launches)
        self.backward_s = busy - forward_s + self.launches_s * backward_launches


def _tensor_parallel_s(
    model: ModelConfig,
    recompute: Recompute,
    layout: Layout,
    zero: ZeroSettings,
    cluster: Cluster,
    passes: _Passes,
) -> float:
    """What a micro-step waits for its all-reduces over the TP group, half of them forward if nothing is
    frozen.

    A block's output is reduced in two chunks, the first one behind the matmul of the second; its input's
    gradient behind the gradients of the weights of qkv and MLP up.
    """
    t = layout.tp_size
    if t == 1:
        return 0.0
    size = tp_bytes(model, recompute, layout.micro_batch, zero, passes.job)
    work, in_node = passes.work, min(t, cluster.gpus_per_node)
    calls = passes.num_blocks * (1 if model.block == "parallel" else 2) * (1 + work.blocks)
    reduce_s = 2 * _ring_s(size, in_node, math.ceil(t / in_node), 1, cluster) + calls * _latency(t, cluster)
    up, square = model.dim * model.mlp_dim, model.dim**2
    pass_s = passes.matmul_pass_s / (4 * square + 2 * up)  # of a matrix entry
    reduced = up if model.block == "parallel" else up + square
    forward_s = reduce_s / (1 + work.blocks)
    chunk = sum(_overlap(forward_s / 2, pass_s * reduced / 2, cluster))
    backward = _overlap(reduce_s - forward_s, pass_s * (3 * square + up) * work.weights, cluster)
    return forward_s / 2 + chunk + sum(backward)


def _data_parallel_s(
    layout: Layout, zero: ZeroSettings, cluster: Cluster, passes: _Passes
) -> tuple[float, float]:
    """(communication of ZeRO that is not hidden and the price of what is, the update itself), a step."""
    job, dp = passes.job, layout.dp_size
    tree, trained = job.tree, job.tree.trained_part()
    share = trained.shared(dp if zero.stage else 1)
    in_node = max(1, min(dp, cluster.gpus_per_node // layout.tp_size))
    nodes = math.ceil(dp / in_node)
    groups = min(layout.tp_size, cluster.gpus_per_node)

    def gather_s(elements: float) -> float:
        return _ring_s(elements * zero.element_bytes, in_node, nodes, groups, cluster)

    def scatter_s(elements: float) -> float:
        return _ring_s(elements * zero.reduced_bytes, in_node, nodes, groups, cluster)

    update_s = _update_s(share, zero, cluster)
    if dp == 1:
        return 0.0, update_s
    latency_s = _latency(dp, cluster)
    whole = trained.numel()
    if zero.stage < 3:
        reduce_s = 2 * scatter_s(whole) + latency_s * max(1, whole / zero.reduce_bucket)
        exposed, tax = _overlap(reduce_s, passes.backward_s, cluster)
        every = layout.grad_accum if zero.stage == 2 else 1
        return every * (exposed + tax) + (gather_s(whole) if zero.stage else 0.0), update_s
    trace = job.gathers(dp, zero.gathers)
    calls = passes.num_blocks + (sum(1 for _ in job.calls.walk()) if job.traces else len(tree.children))
    forward_s = gather_s(trace.gathered_forward) + calls * latency_s
    backward_s = (
        gather_s(trace.gathered - trace.gathered_forward)
        + scatter_s(trained.shared(dp) * dp)
        + 2 * calls * passes.work.blocks * latency_s
    )
    sums = [
        _overlap(forward_s, passes.forward_s, cluster),
        _overlap(backward_s, passes.backward_s, cluster),
    ]
    # Nothing runs yet while the first weights come, and nothing any more while the last gradients go.
    largest, reduced = (max(unit.numel() for unit in part.children) for part in (tree, trained))
    ends_s = gather_s(largest) + scatter_s(reduced)
    per_micro_step = sum(exposed + tax for exposed, tax in sums) + ends_s
    return per_micro_step * layout.grad_accum + gather_s(trace.padded_persistent), update_s


def _overlap(communication_s: float, compute_s: float, cluster: Cluster) -> tuple[float, float]:
    """(what sticks out, what hiding the rest costs)."""
    hidden = min(communication_s, compute_s)
    return communication_s - hidden, cluster.rates.overlap_tax * hidden


def _ring_s(size: float, in_node: int, nodes: int, groups: int, cluster: Cluster) -> float:
    """One gather, or one scatter, of `size` bytes over `in_node` ranks of each of `nodes` nodes, while
    `groups` such groups share each node's network. An all-reduce takes two."""
    inside = (in_node - 1) / in_node * size / (cluster.gpu.link_gb_per_s * 1e9)
    outside = (nodes - 1) / nodes * size * groups / (cluster.network_gb_per_s * 1e9)
    return max(inside, outside) / cluster.rates.link_share


def _latency(ranks: int, cluster: Cluster) -> float:
    nodes = math.ceil(ranks / cluster.gpus_per_node)
    return cluster.rates.latency_s + cluster.rates.latency_per_node_s * nodes


def _update_s(share: int, zero: ZeroSettings, cluster: Cluster) -> float:
    """Adam reads and writes 28 bytes a weight: on a GPU, if nothing else is measured, as much again in
    temporaries, on a host all of its ranks at once."""
    rates = cluster.rates
    if not zero.offload_optimizer:
        return rates.update_bytes * share / (cluster.gpu.memory_gb_per_s * 1e9 * rates.memory_share)
    return 28 * share * cluster.gpus_per_node / (rates.host_adam_gb_per_s * 1e9)


def _host_copies_s(job: Program, layout: Layout, zero: ZeroSettings, cluster: Cluster) -> float:
    """Copies between a GPU and its host's memory in a step, one after the other, none behind compute.

    Gradients go down after every micro-step, come up before the sum of all but the first, and go down once
    more, as the optimizer's. Weights come up after the update, or, where they are offloaded too, whenever
    they are gathered, each rank's share from its own host; DeepSpeed 0.19's gather waits for them.
    """
    if not zero.offload_optimizer:
        return 0.0
    dp, times = layout.dp_size, layout.grad_accum
    share = job.tree.trained_part().shared(dp)
    size = share * 2 * times * zero.accumulated_bytes  # down: times + 1; up: times - 1
    if zero.offload_param:
        trace = job.gathers(dp, zero.gathers)
        size += (trace.gathered * times + trace.padded_persistent) // dp * zero.element_bytes
    else:
        size += share * zero.element_bytes
    return size / (cluster.gpu.host_gb_per_s * 1e9 * cluster.rates.host_link_share)
