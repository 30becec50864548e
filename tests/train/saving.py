"""Real checkpoints without an engine: a model's weights, with moments, as one rank or several hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from megavit.data.lanes import DataState
from megavit.model.vit import MegaVit
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.saver import Saver
from megavit.train.config import CheckpointConfig, RunConfig, plain_config
from megavit.train.zero_state import MOMENTS, Slice
from tests.train.runs import DEMO

TINY = DEMO
RUN = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, depth=1, dim=16, mlp_dim=32))


class ModelState:
    """The part of `ZeroState` that saving and loading use, of a model that every rank holds whole; each saves
    its share of every weight."""

    def __init__(self, run: RunConfig, mesh: Mesh, steps: int = 3):
        self.model = MegaVit.from_config(run.model)
        self.moments = {
            name: {kind: torch.rand_like(parameter) for kind in MOMENTS}
            for name, parameter in self.model.named_parameters()
        }
        self.steps = dict.fromkeys(self.moments, steps)
        self._mesh = mesh

    frozen_layouts: ClassVar[dict[str, Layout]] = {}

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: layout_of(parameter) for name, parameter in self.model.named_parameters()}

    def _tensors(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        whole = {"weight": parameter.detach()} | self.moments[name]
        return {kind: tensor.view(-1) for kind, tensor in whole.items()}

    def owned(self) -> Iterator[Slice]:
        for name, parameter in self.model.named_parameters():
            share = -(-parameter.numel() // self._mesh.dp_size)
            start = min(share * self._mesh.dp_rank, parameter.numel())
            stop = min(start + share, parameter.numel())
            tensors = {kind: flat[start:stop] for kind, flat in self._tensors(name, parameter).items()}
            if start < stop:
                yield Slice(name, start, stop, tensors)

    def optimizer_state(self) -> dict[str, Any]:
        return {"type": "AdamW", "groups": [], "steps": dict(self.steps)}

    def set_steps(self, steps: dict[str, int]) -> None:
        self.steps = {name: steps[name] for name in self.steps}

    def load(self, read: Callable[..., None], *, moments: bool, leave: Collection[str] = ()) -> None:
        for name, parameter in self.model.named_parameters():
            tensors = {
                kind: t for kind, t in self._tensors(name, parameter).items() if moments or kind == "weight"
            }
            values = {kind: np.zeros(parameter.numel(), np.float32) for kind in tensors}
            if name not in leave:
                read(name, layout_of(parameter).boxes(0, 1, 0, parameter.numel()), values)
                for kind, tensor in tensors.items():
                    tensor.copy_(torch.from_numpy(values[kind]))


def fields_of(run: RunConfig, step: int) -> dict[str, Any]:
    """What the loop keeps beside the tensors."""
    data = DataState(step, 0, 96 * step, 32, 16, 0, (), "0" * 8, "0" * 8, 2, 1437)
    state = {
        "data": dataclasses.asdict(data),
        "left_out": [],
        "bad_samples": {"total": 0, "seen": 0, "per_shard": {}, "failing": {}},
        "guard": {"norms": [], "skipped": 0, "in_a_row": 0},
    }
    return {"state": state, "run": plain_config(run), "ds_config": {}}


def saver_of(
    run_dir: Path, state: ModelState | None = None, mesh: Mesh | None = None, **config: Any
) -> Saver:
    mesh = mesh or Mesh.single()
    return Saver(run_dir, CheckpointConfig(**config), mesh, state or ModelState(RUN, mesh))  # type: ignore[arg-type]


def save_steps(run_dir: Path, *steps: int, saver: Saver | None = None, **config: Any) -> Saver:
    """Commit the checkpoints of `steps`, one after the other."""
    saver = saver or saver_of(run_dir, **config)
    for step in steps:
        saver.save(step, fields_of(RUN, step))
        assert saver.wait(60)
        assert [(saved.step, saved.error) for saved in saver.finished()] == [(step, "")]
    return saver
