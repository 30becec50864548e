"""Weights in and out of a run: a checkpoint becomes the single-process model that `MegaVit.from_pretrained`
loads, and such a model becomes the start of a new run.

Both go one tensor at a time, so that host memory holds 0.6 GB of ViT-22B's 89.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megavit.model.config import ModelConfig, model_config
from megavit.model.embed import POSITION, resize_position
from megavit.model.exported import HEAD, check_depth, logical_shapes, open_export, stored_shapes
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE
from megavit.parallel.layout import Box, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, Checkpoint
from megavit.train.checkpoint.manifest import WEIGHT, CheckpointError
from megavit.train.checkpoint.tensorfile import Entry, progress_bar, write_tensors
from megavit.train.zero_state import ZeroState


def export_weights(
    source: Checkpoint, out: Path, *, verify: bool = True, progress: Callable[[int], None] | None = None
) -> Path:
    """Write `out/model.safetensors` (float32, names and shapes of the tp=1 model) and `out/config.json`.

    One process, no GPU; memory for the largest tensor. `progress` is told the number of bytes of each piece
    read for `verify` or written. CheckpointError if a file is damaged (without `verify` only if it is
    missing, short or of other tensors), and if the checkpoint is not one of its own configuration.
    """
    shapes = {name: layout.shape for name, layout in source.layouts.items()}
    _check_model(source, shapes)
    if verify:
        with _bar(
            sum(file.bytes for file in source.files), f"verify {source.folder.name}", progress
        ) as count:
            if problems := source.damage(source.files, count):
                raise CheckpointError("\n".join(problems))
    out.mkdir(parents=True, exist_ok=True)
    entries = {name: Entry("F32", shape) for name, shape in shapes.items()}
    weights, config = (out / f"{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE))
    try:
        size = sum(entry.num_bytes for entry in entries.values())
        with _bar(size, f"export to {out}", progress) as count:
            tensors = (source.tensor(WEIGHT, name) for name in entries)
            write_tensors(weights, entries, tensors, {"format": "pt", "step": str(source.step)}, count)
        config.write_text(json.dumps(source.run["model"], indent=2) + "\n")
        os.replace(config, out / CONFIG_FILE)
        os.replace(weights, out / WEIGHTS_FILE)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)
        source.close()
    return out


def _check_model(source: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """CheckpointError unless the checkpoint holds the weights of the model that it names."""
    config = model_config(source.run["model"])
    try:
        check_depth(config, shapes)
        expected = logical_shapes(config)
        if other := [name for name in expected | shapes if expected.get(name) != shapes.get(name)]:
            name = other[0]
            raise ValueError(f"{name} has shape {shapes.get(name)}, the model needs {expected.get(name)}")
    except ValueError as error:
        path = source.folder / MANIFEST_FILE
        raise CheckpointError(f"{path} does not describe the weights of its run.model: {error}") from error


@contextmanager
def _bar(
    num_bytes: int, title: str, progress: Callable[[int], None] | None
) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; what it is told, `progress` is told too."""
    with progress_bar(num_bytes, title) as bar:

        def count(moved: int) -> None:
            bar.update(moved)
            if progress:
                progress(moved)

        yield count


def load_exported(folder: Path, state: ZeroState, config: ModelConfig, mesh: Mesh) -> str:
    """Start from an exported model: fill this rank's part of the weights; returns what was and was not
    loaded.

    A classifier of another size keeps its initial weights, the position embedding is resized to the new grid;
    tensors that only one of the two models has are left alone. Raises ValueError for a folder that is no
    export or a damaged one, and for any other difference in shape. Collective over DP.
    """
    layouts = {name: layout_of(parameter) for name, parameter in state.named_parameters()}
    notes = []
    with open_export(folder) as (_, file):
        shapes = stored_shapes(file)
        fresh = [name for name in layouts if name not in shapes]
        other_head = [name for name in HEAD if name in layouts and shapes.get(name) != layouts[name].shape]
        position = None
        for name, layout in layouts.items():
            if name in fresh or name in other_head or shapes[name] == layout.shape:
                continue
            if name != POSITION or shapes[name][1] != layout.shape[1]:
                raise ValueError(
                    f"--init_from {folder}: {name} has shape {shapes[name]}, this model needs {layout.shape}"
                )
            position = resize_position(file.get_tensor(name), (config.grid_size, config.grid_size))
            notes.append(f"position embedding resized from {shapes[name][0]} to {layout.shape[0]} tokens")

        def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
            stored = position if name == POSITION and position is not None else file.get_slice(name)
            _read(stored, len(shapes[name]), boxes, out[WEIGHT])

        state.load(read, moments=False, leave=[*fresh, *other_head])
    kept = [name for name in fresh if name not in other_head] + other_head
    unused = sorted(shapes.keys() - layouts.keys())
    notes += [f"newly initialised: {', '.join(kept)}"] if kept else []
    notes += [f"not in this model: {', '.join(unused)}"] if unused else []
    loaded = len(layouts) - len(kept)
    return "; ".join([f"{loaded} of {len(layouts)} tensors loaded from {folder}", *notes])


def _read(stored: Any, dims: int, boxes: list[Box], flat: np.ndarray) -> None:
    """Fill the flat slice that `boxes` describe from a logical tensor, or from safetensors' view of one."""
    for box in boxes:
        rows, columns = slice(box.row, box.row + box.rows), slice(box.column, box.column + box.columns)
        part = stored[rows, columns] if dims == 2 else stored[rows]
        flat[box.offset : box.offset + box.rows * box.columns] = part.reshape(-1).float().numpy()
