"""A rank's weights and optimizer state as flat slices of logical tensors, whatever ZeRO stage holds them.

This is what checkpoints save and restore. Each stage of DeepSpeed 0.19 keeps float32 master weights and
moments in flat buffers of its own; the slices here are views of those buffers, so restoring is copying into
them. All knowledge of the buffers' layout is in this file, for the version that `ds_patches.py` names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megavit.parallel.collectives import broadcast_over_tp
from megavit.parallel.init import initial_values_of
from megavit.parallel.layout import Box, Layout, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.manifest import WEIGHT

# (parameter's name, boxes, flat arrays by kind): fills the arrays, see ZeroState.load
Read = Callable[[str, list[Box], dict[str, np.ndarray]], None]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, the one kind of optimizer that ds_config lets through


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of the flattened TP shard of parameter `name`; `tensors` are 1-D views by kind
    (weight, and the optimizer's)."""

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]


class ZeroState:
    """The training state that one rank holds inside a DeepSpeed engine, for stages 0 to 3, also offloaded to
    the CPU. `statistics`, which are whole on every rank, count as trained, with moments of zero."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        statistics: Mapping[str, Tensor] | None = None,
    ):
        self._engine, self._parameters, self._mesh = engine, parameters, mesh
        self._statistics = statistics or {}
        self._stage: int = engine.zero_optimization_stage()

    @property
    def layouts(self) -> dict[str, Layout]:
        """Of the parameters that are trained, and of the statistics, by logical name."""
        return self._layouts(frozen=False) | {
            name: layout_of(part) for name, part in self._statistics.items()
        }

    @property
    def frozen_layouts(self) -> dict[str, Layout]:
        """Of the frozen parameters, which have weights in the model's dtype only."""
        return self._layouts(frozen=True)

    def _layouts(self, *, frozen: bool) -> dict[str, Layout]:
        return {
            name: layout_of(parameter)
            for name, parameter in self._parameters.items()
            if parameter.requires_grad is not frozen
        }

    def slices(self, *, moments: bool = True, frozen: bool = False) -> Iterator[Slice]:
        """Views of everything this rank holds of the trained parameters, or of their weights alone; with
        `frozen` also of the frozen weights. The moments are made first, zero, if no step has made them yet.

        Stage 0 holds whole shards on every DP rank, the others a partition each; frozen weights are
        partitioned at stage 3 only.
        """
        for name, parameter in self._parameters.items():
            if not (frozen or parameter.requires_grad):
                continue
            place = self._place(parameter)
            if place is None:
                continue
            flat, offset, start, stop = place
            whole = {WEIGHT: flat}
            whole |= self._moments(flat) if moments and parameter.requires_grad else {}
            part = slice(offset, offset + stop - start)
            yield Slice(name, start, stop, {kind: t.detach().view(-1)[part] for kind, t in whole.items()})
        for name, statistic in self._statistics.items():
            flat = statistic.view(-1)
            whole = {WEIGHT: flat} | {kind: torch.zeros_like(flat) for kind in MOMENTS if moments}
            yield Slice(name, 0, flat.numel(), whole)

    def owned(self) -> Iterator[Slice]:
        """The slices that this rank saves: all ranks' together are every shard of what is trained once.

        What is whole on every rank (all at stage 0, statistics) is shared out over the DP ranks; of
        replicated tensors TP rank 0's count.
        """
        layouts = self.layouts
        for part in self.slices():
            if layouts[part.name].dim is None and self._mesh.tp_rank:
                continue
            if self._stage == 0 or part.name in self._statistics:
                share = -(-part.stop // self._mesh.dp_size)
                start = min(share * self._mesh.dp_rank, part.stop)
                stop = min(start + share, part.stop)
                tensors = {kind: tensor[start:stop] for kind, tensor in part.tensors.items()}
                part = Slice(part.name, start, stop, tensors)
            if part.start < part.stop:
                yield part

    def load(self, read: Read, *, moments: bool, leave: Collection[str] = ()) -> None:
        """Fill this rank's slices, frozen ones too, but for the parameters in `leave`, with what
        `read(name, boxes, out)` puts into `out`: a zeroed flat float32 array for each kind, of frozen
        parameters for the weight alone. Collective over DP."""
        layouts = self.layouts | self.frozen_layouts
        for part in self.slices(moments=moments, frozen=True):
            if part.name in leave:
                continue
            boxes = layouts[part.name].boxes(self._mesh.tp_rank, self._mesh.tp_size, part.start, part.stop)
            values = {kind: np.zeros(part.stop - part.start, np.float32) for kind in part.tensors}
            read(part.name, boxes, values)
            for kind, tensor in part.tensors.items():
                tensor.copy_(torch.from_numpy(values[kind]))
        self._refresh()

    def initialise(self) -> None:
        """Fill the weights with their initial values, drawing this rank's own elements only. Collective over
        DP."""
        self.load(self.read_initial, moments=False)

    def read_initial(self, name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
        """The initial weights of a parameter, drawn for the boxes only."""
        part = self._statistics[name] if name in self._statistics else self._parameters[name]
        initial_values_of(part).read(boxes, out[WEIGHT])

    def align_replicas(self) -> list[str]:
        """Compare the replicated parameters' weights and moments with TP rank 0's, to the bit, and take TP
        rank 0's where they differ. The names of those that did, anywhere in the world.

        Each TP rank reduces its own copy's gradients over its own DP group, in which the order of a sum may
        differ. Collective over the world; broadcasts 12 bytes a replicated element of this rank's partition.
        """
        mesh = self._mesh
        layouts = self.layouts
        replicated = [
            (part.name, tensor)
            for part in self.slices()
            if layouts[part.name].dim is None
            for tensor in part.tensors.values()
        ]
        none = torch.empty(0, device=mesh.device)
        mine = torch.cat([none, *(tensor.to(mesh.device) for _, tensor in replicated)])
        firsts = broadcast_over_tp(mesh, mine).split([tensor.numel() for _, tensor in replicated])
        changed = set()
        for (name, tensor), first in zip(replicated, firsts, strict=True):
            first = first.to(tensor.device)
            if not torch.equal(tensor.view(torch.int32), first.view(torch.int32)):
                tensor.copy_(first)
                changed.add(name)
        if not mesh.any(bool(changed)):
            return []
        self._refresh()
        return sorted({name for names in mesh.gather(changed) for name in names})

    def is_finite(self) -> bool:
        """Whether all weights are finite. Collective over the world."""
        tensors = [part.tensors[WEIGHT] for part in self.slices(moments=False, frozen=True)]
        return not self._mesh.any(not all(bool(tensor.isfinite().all()) for tensor in tensors))

    def optimizer_state(self) -> dict[str, Any]:
        """Type, groups' hyperparameters, and each parameter's number of updates, as JSON."""
        steps = dict.fromkeys(self._statistics, 0)
        for name, parameter in self._trained():
            place = self._place(parameter)
            if place is not None:
                steps[name] = int(self._state_of(place[0]).get("step", 0))
        groups = [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in self._engine.basic_optimizer.param_groups
        ]
        return {"type": type(self._engine.basic_optimizer).__name__, "groups": groups, "steps": steps}

    def set_steps(self, steps: dict[str, int]) -> None:
        """Restore the updates counted by each parameter's optimizer state (Adam's bias correction)."""
        done: dict[int, int] = {}
        for name, parameter in self._trained():
            place = self._place(parameter)
            if place is None:
                continue
            flat = place[0]
            assert done.setdefault(id(flat), steps[name]) == steps[name], f"{name} has its own step"
            state = self._state_of(flat)
            state["step"] = self._count(flat, steps[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, part) for name, part in self._parameters.items() if part.requires_grad)

    def _refresh(self) -> None:
        """Bring the weights that compute uses up to date with the master weights. Collective over DP."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer.checkpoint_event_prologue()
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            optimizer.checkpoint_event_epilogue()
        elif self._stage in (1, 2):
            optimizer.update_lp_params()

    def _count(self, flat: Tensor, updates: int) -> Tensor | int:
        """A number of updates in the form in which the optimizer of the buffer `flat` keeps it."""
        optimizer = self._engine.basic_optimizer
        if not type(optimizer).__module__.startswith("torch."):
            return updates
        # A fresh tensor for each buffer: torch's AdamW counts in place. Its fused kernel counts on the GPU.
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        return torch.tensor(float(updates), device=flat.device if on_device else None)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        """(flat master buffer, offset in it, start and stop in the shard) of this rank's part of a parameter;
        None if it has none."""
        optimizer = self._engine.optimizer
        if self._stage == 3 and not parameter.requires_grad:
            flat, numel = parameter.ds_tensor, parameter.ds_numel  # type: ignore[attr-defined]
            start = min(self._mesh.dp_rank * flat.numel(), numel)
            return flat, 0, start, min(start + flat.numel(), numel)
        if self._stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            numel = parameter.ds_numel  # type: ignore[attr-defined]
            start = min(self._mesh.dp_rank * size, numel)
            return optimizer.fp32_partitioned_groups_flat[group], offset, start, min(start + size, numel)
        if self._stage == 0 or not parameter.requires_grad:
            return parameter, 0, 0, parameter.numel()
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        start = mapping.lp_fragment_address.start
        return flat, mapping.hp_fragment_address.start, start, start + mapping.lp_fragment_address.numel

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        return self._engine.basic_optimizer.state[flat]

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._state_of(flat)
        if not state:
            state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS})
            state["step"] = self._count(flat, 0)
        return {kind: state[kind] for kind in MOMENTS}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
