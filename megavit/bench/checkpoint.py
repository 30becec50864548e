"""Saving, verifying and restoring a rank's state: ours against torch.save and torch's distributed
checkpoints.

All write the same tensors (weights and two moments) and flush them to the disk. The clock is wall time, since
the disk counts.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from megavit.bench.report import Row
from megavit.bench.rounds import ratio_to, rounds
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.checkpoint import Checkpoint
from megavit.train.checkpoint.saver import Saver
from megavit.train.config import CheckpointConfig, RunConfig, plain_config
from megavit.train.zero_state import Slice

KINDS = ("weight", "exp_avg", "exp_avg_sq")
_ROW = 4096


class FlatState:
    """What a rank holds, without an engine: `blocks` parameters of [rows, 4096] and their moments."""

    def __init__(self, blocks: int, rows: int):
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        for number in range(blocks):
            name = f"blocks.{number}.weight"
            parameter = nn.Parameter(torch.empty(0))
            parameter.tp_layout = Layout((rows, _ROW), 0)  # type: ignore[attr-defined]
            self.parameters[name] = parameter
            self.tensors[name] = {kind: torch.rand(rows * _ROW) for kind in KINDS}

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: layout_of(parameter) for name, parameter in self.parameters.items()}

    def owned(self) -> Iterator[Slice]:
        for name, tensors in self.tensors.items():
            yield Slice(name, 0, len(tensors["weight"]), tensors)

    def optimizer_state(self) -> dict[str, Any]:
        return {"type": "AdamW", "groups": [], "steps": dict.fromkeys(self.parameters, 1)}


def measure(folder: Path, gib: float, count: int) -> Iterator[Row]:
    """A row for each way, from `count` rounds on the file system of `folder`. Holds `gib` GiB twice."""
    state = FlatState(8, max(1, round(gib * 2**30 / (8 * len(KINDS) * _ROW * 4))))
    flat = {f"{kind}/{name}": t for name, tensors in state.tensors.items() for kind, t in tensors.items()}
    size = sum(tensor.nbytes for tensor in flat.values()) / 2**30
    saver = Saver(folder, CheckpointConfig(keep=1), Mesh.single(), state)  # type: ignore[arg-type]
    fields = {"state": {}, "run": plain_config(RunConfig()), "ds_config": {}}
    out = {name: np.empty(len(tensors["weight"]), np.float32) for name, tensors in state.tensors.items()}
    stalls: list[float] = []

    def save() -> None:
        saver.save(len(stalls) + 1, fields)
        saver.wait()
        (saved,) = saver.finished()
        if saved.error:
            raise ValueError(f"--folder {folder.parent}: a checkpoint cannot be saved: {saved.error}")
        stalls.append(saved.stall_s)

    def newest() -> Checkpoint:
        return Checkpoint.open(saver.folder / (saver.folder / "latest").read_text().strip())

    def verify() -> None:
        found = newest()
        assert not found.damage(found.files)

    def restore() -> None:
        found = newest()
        for name, layout in found.layouts.items():
            boxes = layout.boxes(0, 1, 0, len(out[name]))
            for kind in KINDS:
                found.read(name, boxes, {kind: out[name]})

    # As ours do, they write new files before the old ones go: rewriting a file's own blocks is faster.
    def torch_save() -> None:
        with open(folder / "torch.new", "wb") as file:
            torch.save(flat, file)
            file.flush()
            os.fsync(file.fileno())
        (folder / "torch.new").replace(folder / "torch.pt")

    def dcp_save() -> None:
        dcp.save(flat, checkpoint_id=folder / "dcp.new", no_dist=True)
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        (folder / "dcp.new").rename(folder / "dcp")

    def dcp_load() -> None:
        dcp.load(flat, checkpoint_id=folder / "dcp", no_dist=True)

    def torch_load() -> None:
        torch.load(folder / "torch.pt")

    # Each with the way that it is compared with.
    ways: dict[str, tuple[Callable[[], None], str | None]] = {
        "save, with checksums and commit": (save, "save, torch.save"),
        "save, torch.save": (torch_save, "save, torch.save"),
        "save, torch.distributed.checkpoint": (dcp_save, "save, torch.save"),
        "restore": (restore, "restore, torch.load"),
        "restore, torch.load": (torch_load, "restore, torch.load"),
        "restore, torch.distributed.checkpoint": (dcp_load, "restore, torch.load"),
        "verify every byte": (verify, None),
    }
    seconds = rounds({name: way for name, (way, _) in ways.items()}, count, time.perf_counter)
    for name, (_, base) in ways.items():
        row = {"way": name, "gib_per_s": size / median(seconds[name])}
        yield row | (ratio_to(base, seconds, name) if base else {})
    # The first save also allocates the host's memory.
    yield {"way": "copy to host memory, for which training waits", "gib_per_s": size / median(stalls[1:])}
