"""Bytes that one rank's collectives carry in a step: predicted (`counter.py` counts them in a running
program).

A collective's bytes are those of the whole tensor that it makes or reads on a rank: an all-reduce's tensor,
an all-gather's result, a reduce-scatter's input. A ring of n ranks moves (n - 1)/n of a gather or scatter,
and twice that of an all-reduce, over each rank's link.
"""

from __future__ import annotations

from collections import Counter

from megavit.model.config import ModelConfig, Recompute
from megavit.scale.inventory import Unit
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.program import Program, program
from megavit.tasks.config import TaskConfig


def step_traffic(
    model: ModelConfig,
    recompute: Recompute,
    layout: Layout,
    zero: ZeroSettings,
    freeze: str = "",
    task: TaskConfig | None = None,
) -> dict[tuple[str, int], int]:
    """Bytes of one optimizer step's collectives on one rank, by (collective, ranks in its group), in the
    steady state (from the third step on). Exact but for a few scalars (loss, norm), under 100 bytes."""
    traffic: Counter[tuple[str, int]] = Counter()
    job = program(model, layout.tp_size, freeze, task, zero.bf16)
    traced, reduced = job.numbers(layout.micro_batch), job.reduced()
    if layout.tp_size > 1:
        per_micro_step = tp_bytes(model, recompute, layout.micro_batch, zero, job)
        traffic["all_reduce", layout.tp_size] = per_micro_step * layout.grad_accum
    dp = layout.dp_size
    if dp == 1:
        return dict(traffic)
    traffic["all_reduce", dp] += traced["dp", "all_reduce"] * layout.grad_accum
    if zero.stage == 3:
        gathers = job.gathers(dp, zero.gathers)
        gathered = gathers.gathered * layout.grad_accum + gathers.padded_persistent
        traffic["all_gather", dp] = gathered * zero.element_bytes
        scattered = reduced.shared(dp) * dp * layout.grad_accum
        traffic["reduce_scatter", dp] = scattered * zero.reduced_bytes
    else:
        times = layout.grad_accum if zero.stage == 2 else 1
        traffic["all_reduce", dp] += reduced.numel() * zero.reduced_bytes * times
        if zero.stage:
            traffic["all_gather", dp] = job.tree.trained_part().numel() * zero.element_bytes
    return dict(traffic)


def tp_bytes(
    model: ModelConfig, recompute: Recompute, micro_batch: int, zero: ZeroSettings, job: Program
) -> int:
    """Bytes all-reduced over a TP group in one forward and backward pass.

    A parallel block reduces its output forward and its input's gradient backward; a sequential one each
    twice. Recomputation leaves out a block's last reduce, so only full recomputation of a sequential block
    repeats one; but layer scale's backward reads what it scales, and repeats that reduce too. A frozen block
    that the backward pass reaches sends what a trained one does, the sums of its QK scales' gradients too.
    """
    stream = micro_batch * model.num_tokens * model.dim
    sequential = model.block == "sequential"
    forward = 1 + sequential
    backward = forward + (sequential and recompute == "full")
    backward += model.layer_scale is not None and recompute != "none"
    scales = 2 * model.head_dim if model.qk_norm else 0
    blocks = job.blocks()
    reached = sum(block.has_backward for block in blocks)
    elements = len(blocks) * forward * stream + reached * (backward * stream + scales)
    if job.traces:
        return elements * zero.element_bytes + job.numbers(micro_batch)["tp", "all_reduce"]
    more, classifier = _outside(model, micro_batch, zero, job.tree)
    return (elements + more) * zero.element_bytes + classifier


def _outside(model: ModelConfig, micro_batch: int, zero: ZeroSettings, tree: Unit) -> tuple[int, int]:
    """The same outside of a classifier's blocks: elements in the model's dtype, and bytes."""
    elements, pooled = 0, micro_batch * model.dim
    outside = {unit.name: unit for unit in tree.children if not unit.is_block}
    if "pool" in outside:
        pool = outside["pool"]
        elements += 2 * pooled  # forward: attention output and MLP
        if outside["norm"].has_backward or pool.trained:  # the tokens, the probe
            elements += micro_batch * model.num_patches * model.dim + model.dim
        if any(part.name == "norm" and part.has_backward for part in pool.children):  # the MLP's input
            elements += pooled
    # The classifier's input has a float32 gradient. With nothing before it to train, only ZeRO-3 wants it:
    # the engine keeps its weights until backward that way.
    before = outside.get("pool", outside["norm"])
    classifier = bool(model.num_classes) and (before.has_backward or zero.stage == 3)
    return elements, 4 * pooled if classifier else 0
