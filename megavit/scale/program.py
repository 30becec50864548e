"""What one rank of a run trains, and what it runs of it in a micro-step: by formulas for the task `classify`,
by a trace of the root module for any other."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from megavit.data.config import DataConfig
from megavit.model.config import ModelConfig
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.scale.gathers import GatherLimits, GatherTrace, persistent_elements, replay
from megavit.scale.inventory import Unit, flat_inventory, inventory
from megavit.scale.trace import Trace, fake_mesh, trace
from megavit.tasks.config import ClassifyConfig, TaskConfig
from megavit.tasks.task import Task, make_task
from megavit.train.optim import freeze as freeze_modules

_TRACED = (2, 4)  # micro-batches: everything grows linearly with them


@dataclass(frozen=True)
class Program:
    """`tree` has every parameter once, `calls` the modules that a micro-step runs, in order. Without `traces`
    all that they do has formulas."""

    tree: Unit
    calls: Unit
    traces: tuple[Trace, ...] = ()

    def numbers(self, micro_batch: int) -> Counter[Any]:
        """What `Trace.numbers` are for that micro-batch; empty without traces."""
        if not self.traces:
            return Counter()
        few, many = (found.numbers for found in self.traces)
        steps = (micro_batch - _TRACED[0]) / (_TRACED[1] - _TRACED[0])
        return Counter({name: round(few[name] + (many[name] - few[name]) * steps) for name in many})

    def blocks(self) -> list[Unit]:
        """The blocks that have formulas, the trunk's, in the order in which they run."""
        return [unit for unit in self.calls.walk() if unit.is_block and not unit.traced]

    def reduced(self) -> Unit:
        """The parameters that get gradients, each once."""
        if not self.traces:
            return self.tree.trained_part()
        used = {unit.name for unit in self.calls.walk()}
        return replace(
            self.tree, children=tuple(unit for unit in self.tree.children if unit.name in used)
        ).trained_part()

    def gathers(self, ranks: int, limits: GatherLimits) -> GatherTrace:
        """The gathers of a micro-step over `ranks` data-parallel ranks."""
        found = replay(self.calls, ranks, limits)
        return replace(found, padded_persistent=persistent_elements(self.tree, ranks, limits))


@functools.lru_cache(maxsize=64)
def program(
    model: ModelConfig, tp_size: int, freeze: str = "", task: TaskConfig | None = None, bf16: bool = True
) -> Program:
    """What one of `tp_size` ranks runs; no `task` is `classify`. ValueError for what the trainer refuses too,
    and for a task that cannot be traced."""
    if task is None or task.name == ClassifyConfig.name:
        tree = inventory(model, tp_size, freeze)
        return Program(tree, tree)
    made, traces = make_task(task, model, DataConfig()), []
    for micro_batch in _TRACED:
        mesh = fake_mesh(tp_size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = _build(made, mesh, freeze, torch.bfloat16 if bf16 else torch.float32)
            tree = flat_inventory(module)
            try:
                traces.append(trace(made, module, mesh, micro_batch))
            except Exception as error:  # whatever a task of the user's runs into without data
                raise ValueError(
                    f"the task {task.name} cannot be planned for: its root module does not run on tensors "
                    f"without data ({type(error).__name__}: {error})"
                ) from error
    return Program(tree, traces[0].calls, tuple(traces))


def module_on_meta(model: ModelConfig, tp_size: int, freeze: str, task: TaskConfig | None) -> nn.Module:
    """One rank's root module without memory, its frozen parameters without gradients."""
    made = make_task(task or ClassifyConfig(), model, DataConfig())
    with torch.device("meta"):
        return _build(made, Mesh(tp_size=tp_size), freeze, torch.float32)


def _build(task: Task, mesh: Mesh, freeze: str, dtype: torch.dtype) -> nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = task.build(Initializer(0, mesh, deferred=True), "none")
    finally:
        torch.set_default_dtype(usual)
    freeze_modules(module, freeze)
    return module
