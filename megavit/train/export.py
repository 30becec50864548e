"""Weights in and out of a run: a checkpoint becomes the single-process model that `MegaVit.from_pretrained`
loads, and such a model becomes the start of a new run.

Both go one tensor at a time, so that host memory holds 0.6 GB of ViT-22B's 89.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from megavit.config import ModelConfig
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE, resize_position
from megavit.parallel.layout import Box, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import WEIGHT, Checkpoint, CheckpointError
from megavit.train.tensorfile import Entry, progress_bar, write_tensors
from megavit.train.zero_state import ZeroState

_POSITION = "embed.position"
_HEAD = ("head.weight", "head.bias")


def export_weights(source: Checkpoint, out: Path, *, verify: bool = True) -> Path:
    """Write `out/model.safetensors` (float32, names and shapes of the tp=1 model) and `out/config.json`.

    One process, no GPU; memory for the largest tensor. CheckpointError if a file is damaged (without
    `verify` only if it is missing or short).
    """
    if verify:
        with progress_bar(sum(file.bytes for file in source.files), f"verify {source.folder.name}") as bar:
            if problems := source.damage(source.files, bar.update):
                raise CheckpointError("\n".join(problems))
    out.mkdir(parents=True, exist_ok=True)
    entries = {name: Entry("F32", layout.shape) for name, layout in source.layouts.items()}
    partial = out / f"{WEIGHTS_FILE}.partial"
    try:
        with progress_bar(sum(entry.num_bytes for entry in entries.values()), f"export to {out}") as bar:
            tensors = _tensors(source, entries)
            write_tensors(partial, entries, tensors, {"format": "pt", "step": str(source.step)}, bar.update)
        (out / CONFIG_FILE).write_text(json.dumps(source.run["model"], indent=2) + "\n")
        os.replace(partial, out / WEIGHTS_FILE)
    finally:
        partial.unlink(missing_ok=True)
        source.close()
    return out


def _tensors(source: Checkpoint, entries: dict[str, Entry]) -> Iterator[np.ndarray]:
    for name in entries:
        yield source.tensor(WEIGHT, name)


def load_exported(folder: Path, state: ZeroState, config: ModelConfig, mesh: Mesh) -> str:
    """Start from an exported model: fill this rank's part of the weights; returns what was and was not
    loaded.

    A classifier of another size keeps its initial weights, the position embedding is resized to the new grid;
    tensors that only one of the two models has are left alone. Raises ValueError for a folder that is no
    export, and for any other difference in shape. Collective over DP.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"--init_from {folder} is not an exported model: {file} is missing")
    layouts = {name: layout_of(parameter) for name, parameter in state.named_parameters()}
    notes = []
    with safe_open(folder / WEIGHTS_FILE, framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        fresh = [name for name in layouts if name not in shapes]
        other_head = [name for name in _HEAD if name in layouts and shapes.get(name) != layouts[name].shape]
        position = None
        for name, layout in layouts.items():
            if name in fresh or name in other_head or shapes[name] == layout.shape:
                continue
            if name != _POSITION or shapes[name][1] != layout.shape[1]:
                raise ValueError(
                    f"--init_from {folder}: {name} has shape {shapes[name]}, this model needs {layout.shape}"
                )
            position = resize_position(torch.from_numpy(file.get_tensor(name)), config.grid_size).numpy()
            notes.append(f"position embedding resized from {shapes[name][0]} to {layout.shape[0]} tokens")

        def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
            stored = position if name == _POSITION and position is not None else file.get_slice(name)
            _read(stored, boxes, out[WEIGHT])

        state.load(read, moments=False, leave=[*fresh, *other_head])
    kept = [name for name in fresh if name not in other_head] + other_head
    unused = sorted(shapes.keys() - layouts.keys())
    notes += [f"newly initialised: {', '.join(kept)}"] if kept else []
    notes += [f"not in this model: {', '.join(unused)}"] if unused else []
    loaded = len(layouts) - len(kept)
    return "; ".join([f"{loaded} of {len(layouts)} tensors loaded from {folder}", *notes])


def _read(stored: Any, boxes: list[Box], flat: np.ndarray) -> None:
    """Fill the flat slice that `boxes` describe from a logical tensor (an array or a safetensors slice)."""
    for box in boxes:
        rows, columns = slice(box.row, box.row + box.rows), slice(box.column, box.column + box.columns)
        two_dims = len(stored.get_shape() if hasattr(stored, "get_shape") else stored.shape) == 2
        part = stored[rows, columns] if two_dims else stored[rows]
        flat[box.offset : box.offset + box.rows * box.columns] = part.reshape(-1)
