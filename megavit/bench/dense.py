"""A step of a dense head on a trunk that is trained, frozen, or frozen with its features on disk.

One process, one thread, CPU time; random weights and pictures. A step is forward, backward and AdamW of what
is trained.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megavit.bench.counters import memory_of_step
from megavit.bench.report import Row
from megavit.bench.rounds import clock_of, ratio_to, rounds
from megavit.data.config import DataConfig
from megavit.model.config import model_preset
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import DenseConfig, DepthConfig, SegmentConfig
from megavit.tasks.task import Task, Training, blank_samples, make_task

HEADS: dict[str, DenseConfig] = {
    "depth, dpt": DepthConfig(head="dpt"),
    "segmentation, linear": SegmentConfig(classes=150),
}
_TRAINED, _FROZEN, _CACHED = "trained", "frozen", "frozen, cached"


def measure(preset: str, batch: int, count: int, device: str) -> Iterator[Row]:
    """A row for each head and way, at `batch` pictures, from `count` rounds."""
    model = model_preset(preset, num_classes=0)
    for head, config in HEADS.items():
        with tempfile.TemporaryDirectory() as folder:
            cached = replace(config, cache_features=folder)
            ways = {_TRAINED: config, _FROZEN: config, _CACHED: cached}
            steps = {
                way: _Step(make_task(task, model, DataConfig()), batch, device, frozen=way != _TRAINED)
                for way, task in ways.items()
            }
            memory = {way: memory_of_step(step.loss, step.clear) for way, step in steps.items()}
            seconds = rounds({**steps}, count, clock_of(device))
        for way in steps:
            yield {
                "head": head,
                "trunk": way,
                "images_per_s": batch / statistics.median(seconds[way]),
                **ratio_to(_TRAINED, seconds, way),
                "kept_mib_per_image": memory[way].kept / batch / 2**20,
                "peak_mib_per_image": memory[way].peak / batch / 2**20,
            }


class _Step:
    """A training step; `loss` is its forward pass alone."""

    def __init__(self, task: Task, batch: int, device: str, *, frozen: bool):
        mesh = Mesh.single()
        with torch.device(device):
            self.module: Any = task.build(Initializer(0, mesh), "none")
        self.module.train()
        if frozen:
            self.module.get_submodule("trunk").requires_grad_(False).eval()
        task.begin(self.module, Training(batch, "bench", "bench"))
        samples = blank_samples(task, batch, mesh.device)
        for field in task.fields():
            samples.fields[field.name].random_(1, 100)
        samples = samples._replace(numbers=torch.arange(batch))
        self.inputs = task.inputs(samples, mesh, training=True)
        trained: list[nn.Parameter] = [part for part in self.module.parameters() if part.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def loss(self) -> Tensor:
        found: Tensor = self.module(self.inputs).loss
        return found

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.clear()
