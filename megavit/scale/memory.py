"""Memory of one rank's training, item by item, predicted from sizes.

Two kinds of items: what is there during the whole run (`persistent`), and what is there on top at the moment
of a step that needs most (`transient`): somewhere between the end of the forward pass and the first blocks'
backward pass, or in the optimizer. All figures in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavit.model.config import ModelConfig, Recompute
from megavit.scale.gathers import Moment
from megavit.scale.inventory import Unit
from megavit.scale.job import Layout, ZeroSettings
from megavit.scale.program import Program, program
from megavit.tasks.config import TaskConfig

_MOMENT_BYTES = 8  # Adam's two, float32


@dataclass(frozen=True)
class Memory:
    """Bytes by item. The optimizer's share is on the host if it is offloaded (`host`)."""

    persistent: dict[str, int]
    transient: dict[str, int]
    host: dict[str, int]
    peak_moment: str  # in words

    @property
    def persistent_bytes(self) -> int:
        return sum(self.persistent.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def peak_bytes(self) -> int:
        return self.persistent_bytes + sum(self.transient.values())


def predict_memory(
    model: ModelConfig,
    recompute: Recompute,
    layout: Layout,
    zero: ZeroSettings,
    freeze: str = "",
    task: TaskConfig | None = None,
    *,
    on_cpu: bool = False,
) -> Memory:
    """Memory of one rank, at its peak in the steady state. What is frozen has weights in the model's dtype
    and nothing else. No `task` is classification. `on_cpu` is for rehearsals there: in the peak, pages of
    buffers that nobody writes do not count."""
    job = program(model, layout.tp_size, freeze, task, zero.bf16)
    tree, trained = job.tree, job.tree.trained_part()
    persistent, host = _states(tree, trained, layout, zero)
    gradients, bucket = _gradients(trained, layout, zero), _bucket(zero)
    if zero.stage == 3:  # allocated once; the other stages do it in every step
        persistent |= gradients | bucket
        gradients, bucket = {}, {}
    peak_moment, in_step = _in_step(model, recompute, layout, zero, job, on_cpu)
    unwritten = {"pages of the bucket never written": -_unwritten(job, layout, zero)} if on_cpu else {}
    in_step |= gradients | bucket | unwritten
    in_update = _in_update(trained, layout, zero, on_cpu) | gradients | (unwritten if zero.stage == 3 else {})
    if sum(in_update.values()) > sum(in_step.values()):
        peak_moment, in_step = "the update", in_update
    return Memory(_nonzero(persistent), _nonzero(in_step), _nonzero(host), peak_moment)


def _nonzero(items: dict[str, int]) -> dict[str, int]:
    return {name: int(size) for name, size in items.items() if size}


def _states(
    tree: Unit, trained: Unit, layout: Layout, zero: ZeroSettings
) -> tuple[dict[str, int], dict[str, int]]:
    """(on the device, on the host) between two steps: weights, master weights, moments."""
    whole, share, size = tree.numel(), trained.shared(layout.dp_size), zero.element_bytes
    if zero.stage == 0:
        return {"weights": size * whole, "Adam's moments": _MOMENT_BYTES * trained.numel()}, {}
    # DeepSpeed keeps master weights beside float32 weights too.
    items = {"master weights": 4 * share, "Adam's moments": _MOMENT_BYTES * share}
    host: dict[str, int] = {}
    if zero.offload_optimizer:  # gradients arrive in one buffer and are handed to Adam in another
        items, host = {}, items | {"gradients": 8 * share}
    if zero.stage < 3:
        return {"weights": size * whole} | items, host
    small = sum(n for n in tree.all_sizes if n <= zero.gathers.persistence)
    (host if zero.offload_param else items)["weights"] = size * tree.shared(layout.dp_size)
    return items | {"small weights that are not sharded": size * small}, host


def _gradients(trained: Unit, layout: Layout, zero: ZeroSettings) -> dict[str, int]:
    """What accumulates over the micro-steps."""
    if zero.offload_optimizer:
        return {}
    if zero.stage < 2:
        return {"gradients": zero.element_bytes * trained.numel()}
    return {"gradients": zero.accumulated_bytes * trained.shared(layout.dp_size)}


def _bucket(zero: ZeroSettings) -> dict[str, int]:
    """The buffer that gradients wait in to be reduced; stages 1 and 2 have a second one to fill meanwhile."""
    return {"gradient bucket": _bucket_elements(zero) * _bucket_element_bytes(zero)}


def _bucket_elements(zero: ZeroSettings) -> int:
    return zero.reduce_bucket * {0: 0, 1: 2, 2: 2, 3: 1}[zero.stage]


def _bucket_element_bytes(zero: ZeroSettings) -> int:
    return zero.reduced_bytes if zero.stage == 3 else zero.element_bytes


def _unwritten(job: Program, layout: Layout, zero: ZeroSettings) -> int:
    """Bytes of the bucket that a step's gradients do not reach."""
    elements = _bucket_elements(zero) - job.reduced().numel() * layout.grad_accum
    return max(0, elements) * _bucket_element_bytes(zero)


def _in_step(
    model: ModelConfig, recompute: Recompute, layout: Layout, zero: ZeroSettings, job: Program, on_cpu: bool
) -> tuple[str, dict[str, int]]:
    """The moment of forward and backward that needs most: gathered weights and activations come and go
    together."""
    activations = Activations(model, recompute, layout, zero.element_bytes)
    traced = job.numbers(layout.micro_batch)
    # Of a block the trace has the input, and the output or its gradient while it runs.
    in_trace = activations.stream if traced else 0
    kind = "bytes on a CPU" if on_cpu else "bytes"
    moments: tuple[Moment, ...]
    if zero.stage == 3 and (layout.dp_size > 1 or zero.offload_param):
        moments = job.gathers(layout.dp_size, zero.gathers).moments
    else:
        moments = _without_gathers(job)
    found: list[tuple[str, dict[str, int]]] = []
    bucket = _Bucket(layout, zero)
    outside = 0 if traced else activations.outside(job.tree)
    blocks_done = blocks_kept = 0
    for moment in moments:
        unit = moment.unit
        is_block = unit.is_block and not unit.traced
        items = {"gathered weights": moment.peak * zero.element_bytes}
        blocks_done -= is_block and moment.backward
        blocks_kept -= is_block and moment.backward
        items["activations kept for backward"] = outside + blocks_kept * (activations.per_block - in_trace)
        items["activations outside of the trunk's blocks"] = traced[kind, unit.call, moment.backward]
        if is_block:
            working_set = activations.working_set(backward=moment.backward, keeps=unit.has_backward)
            items["working set of the running block"] = working_set - in_trace
        if moment.backward:
            items["gradients not reduced yet"] = 0 if unit.traced else sum(unit.trained) * zero.element_bytes
            items["copy of the gradients being reduced"] = bucket.add(unit.trained)
        blocks_done += is_block and not moment.backward
        blocks_kept += is_block and not moment.backward and unit.has_backward
        found.append((_in_words(moment, blocks_done), items))
    end = {
        "gathered weights": moments[-1].live * zero.element_bytes,
        "copy of the gradients being reduced": bucket.flush(),
    }
    found.append(("end of the backward pass", end))
    return max(found, key=lambda moment: sum(moment[1].values()))


class _Bucket:
    """How full the buffer of gradients is. A reduce-scatter (stage 3) first puts them in another order, in a
    copy, and its result is converted to what they accumulate in; an all-reduce (stages 1 and 2) works on a
    copy if they are reduced in another precision than the weights'."""

    def __init__(self, layout: Layout, zero: ZeroSettings):
        self.layout, self.zero = layout, zero
        self.fill = 0  # elements

    def add(self, sizes: tuple[int, ...]) -> int:
        """Bytes of the largest copy while gradients of these sizes come."""
        most = 0
        for size in sizes:
            if self.fill and self.fill + size > self.zero.reduce_bucket:
                most = max(most, self.flush())
            self.fill += size
        return most

    def flush(self) -> int:
        elements, self.fill = self.fill, 0
        zero, dp_size = self.zero, self.layout.dp_size
        if not zero.stage or dp_size == 1:
            return 0
        size = elements * zero.reduced_bytes
        if zero.stage < 3:
            return size if zero.reduced_bytes != zero.element_bytes else 0
        converted = 4 * math.ceil(elements / dp_size)
        return size + (converted if zero.reduced_bytes != zero.accumulated_bytes else 0)


def _without_gathers(job: Program) -> tuple[Moment, ...]:
    leaves = tuple(job.calls.walk()) if job.traces else job.tree.children
    forward = [Moment(unit, False, 0, 0) for unit in leaves]
    return (*forward, *(Moment(unit, True, 0, 0) for unit in reversed(leaves) if unit.has_backward))


def _in_words(moment: Moment, block: int) -> str:
    is_block = moment.unit.is_block and not moment.unit.traced
    what = f"block {block}" if is_block else moment.unit.name or "the start"
    return f"{'backward' if moment.backward else 'forward'} pass of {what}"


def _in_update(trained: Unit, layout: Layout, zero: ZeroSettings, on_cpu: bool) -> dict[str, int]:
    """Adam works on one sub-group at a time (stage 3), with a flat copy of its gradients and, where it is not
    fused (`resolve_ds_config`), two temporaries."""
    if zero.offload_optimizer:
        return {}
    elements = trained.shared(layout.dp_size if zero.stage else 1)
    if zero.stage == 3:
        elements = min(elements, zero.sub_group)
    copies = (1 if zero.stage else 0) + (0 if on_cpu else 2)
    return {"optimizer's temporaries": copies * 4 * elements}


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch's forward pass leaves for backward, and what a block needs while it runs.

    In units of one [B, N, D] tensor, with F the MLP's width over D and t the TP ranks; x the block's input.
    Without dropout, whose masks would come on top.
    """

    model: ModelConfig
    recompute: Recompute
    layout: Layout
    element_bytes: int

    @property
    def tokens(self) -> int:
        return self.layout.micro_batch * self.model.num_tokens

    @property
    def stream(self) -> int:
        """One [B, N, D] tensor."""
        return self.tokens * self.model.dim * self.element_bytes

    @property
    def per_block(self) -> int:
        """Kept from forward to backward by one block."""
        if self.recompute == "full":
            return self.stream
        in_units = self._selective if self.recompute == "selective" else self._none
        return int(in_units * self.stream) + self._statistics

    @property
    def _ratio(self) -> float:
        return self.model.mlp_dim / self.model.dim

    @property
    def _selective(self) -> float:
        """x; q k v, attention output, MLP's hidden layer before GELU."""
        return 1 + (4 + self._ratio) / self.layout.tp_size

    @property
    def _none(self) -> float:
        """x, normalised x; q k v, normalised q k, attention output, hidden layer before and after GELU."""
        norms = 2 if self.model.block == "sequential" else 1
        inputs = 2 if self.model.block == "sequential" else 1
        qk = 2 if self.model.qk_norm else 0
        return norms + inputs + (4 + qk + 2 * self._ratio) / self.layout.tp_size

    @property
    def _statistics(self) -> int:
        """Float32 numbers a row: attention's log-sum-exp, the norms' inverse."""
        heads = self.model.num_heads // self.layout.tp_size
        rows = heads + (2 * heads if self.model.qk_norm else 0) + 1
        return self.tokens * 4 * rows

    def working_set(self, *, backward: bool, keeps: bool = True) -> int:
        """The most that a block holds beside what it keeps, while it runs forward or backward. One that the
        backward pass does not reach `keeps` nothing."""
        t = self.layout.tp_size
        if not backward:
            alive = 2 + self._ratio / t if keeps and self.recompute == "none" else self._none
            return int(alive * self.stream)
        rebuilt = {"none": 0.0, "selective": self._none - self._selective, "full": self._none - 1}
        # Gradients of the output, of the hidden layer before and after GELU, of the normalised input.
        gradients = 2 + 2 * self._ratio / t
        return int((rebuilt[self.recompute] + gradients) * self.stream)

    def outside(self, tree: Unit) -> int:
        """Kept outside the blocks: images, patches, embedded tokens, the last norm, MAP's keys and values,
        logits, and beside bfloat16 weights the classifier's float32 copy of its own; all but images and
        logits only where the backward pass comes by."""
        model, t = self.model, self.layout.tp_size
        reached = {unit.name for unit in tree.children if unit.has_backward}
        images = self.tokens * model.channels * model.patch_size**2 * self.element_bytes
        embed = images + self.stream if "embed" in reached else 0
        norm = self.stream if "norm" in reached else 0
        pool = (2 / t + 1) * self.stream if model.pool == "map" else self.stream
        pool = pool if "pool" in reached or "norm" in reached else 0
        classes = math.ceil(model.num_classes / t)
        logits = self.layout.micro_batch * classes * 5 * 4
        copy = classes * model.dim * 4 if self.element_bytes < 4 else 0
        return int(images + embed + norm + pool) + logits + copy
