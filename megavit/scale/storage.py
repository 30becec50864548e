"""Checkpoint I/O of a planned job: what each rank writes and reads, from the format itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from megavit.parallel.init import logical_parameters
from megavit.parallel.layout import layout_of
from megavit.scale.job import Layout
from megavit.scale.program import module_on_meta
from megavit.train.checkpoint.checkpoint import Checkpoint
from megavit.train.checkpoint.manifest import WEIGHT, Frozen, RankFile
from megavit.train.config import RunConfig, plain_config
from megavit.train.zero_state import MOMENTS

_KINDS = (WEIGHT, *MOMENTS)  # float32 each


@dataclass(frozen=True)
class CheckpointCost:
    """Bytes of one checkpoint; `most_bytes` is the largest rank's tensors. Each rank writes its file once; at
    a start it reads one file to verify it and then what it needs, at most its share again."""

    files: int
    total_bytes: int
    most_bytes: int
    manifest_bytes: int

    def save_s(self, gb_per_s: float) -> float:
        return self.total_bytes / (gb_per_s * 1e9)

    def load_s(self, gb_per_s: float) -> float:
        return 2 * self.total_bytes / (gb_per_s * 1e9)


def checkpoint_cost(run: RunConfig, layout: Layout) -> CheckpointCost:
    """The checkpoint of a ZeRO-3 run: every rank's slices, laid out as the trainer does, and the manifest
    that names them. Stages 1 and 2 cut elsewhere, into as many bytes. It does not hold what is frozen."""
    described = _describe(run, layout)
    sizes = [file.bytes for file in described.files]
    manifest = json.dumps(described.manifest(), separators=(",", ":"))
    return CheckpointCost(len(sizes), sum(sizes), max(sizes), len(manifest))


def _describe(run: RunConfig, layout: Layout) -> Checkpoint:
    found = logical_parameters(module_on_meta(run.model, layout.tp_size, run.freeze, run.task))
    parameters = {name: (p.numel(), layout_of(p)) for name, p in found.items() if p.requires_grad}
    frozen = {name: layout_of(p) for name, p in found.items() if not p.requires_grad}
    files = []
    for rank in range(layout.ranks):
        dp_rank, tp_rank = divmod(rank, layout.tp_size)
        slices = {}
        for name, (numel, cut) in parameters.items():
            share = math.ceil(numel / layout.dp_size)
            start = min(dp_rank * share, numel)
            stop = min(start + share, numel)
            if start < stop and (cut.dim is not None or tp_rank == 0):
                slices[name] = (start, stop)
        size = sum(stop - start for start, stop in slices.values()) * 4 * len(_KINDS)
        files.append(RankFile(f"rank_{rank:05d}.safetensors", size, 2**32 - 1, tp_rank, slices))
    run = replace(run, tensor_parallel_size=layout.tp_size)
    return Checkpoint(
        folder=Path(),
        step=run.max_steps,
        tp_size=layout.tp_size,
        dp_size=layout.dp_size,
        kinds=_KINDS,
        layouts={name: cut for name, (_, cut) in parameters.items()},
        files=tuple(files),
        optimizer={"steps": dict.fromkeys(parameters, run.max_steps)},
        saved_at="2026-01-01T00:00:00+0000",
        state={},
        run=plain_config(run),
        ds_config={},
        frozen=Frozen(exported=frozen),
    )
