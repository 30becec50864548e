"""Weights in and out of a run: a checkpoint becomes the single-process model that `MegaVit.from_pretrained`
loads, and such a model becomes the start of a new run.

Both go one tensor at a time, so that host memory holds 0.6 GB of ViT-22B's 89.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from megavit.model.config import ModelConfig, model_config
from megavit.model.exported import check_depth, logical_shapes
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE
from megavit.parallel.init import Initializer, initial_values_of, logical_parameters
from megavit.parallel.layout import Box, Layout
from megavit.parallel.mesh import Mesh
from megavit.recipe import DEFAULT_TASK, make_run
from megavit.tasks.task import make_task
from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, Checkpoint
from megavit.train.checkpoint.frozen import Read, check_digest, exported_weights, frozen_reader
from megavit.train.checkpoint.manifest import WEIGHT, CheckpointError
from megavit.train.checkpoint.tensorfile import Entry, progress_bar, write_tensors
from megavit.train.config import flat_config
from megavit.train.zero_state import ZeroState

TASK_WEIGHTS_FILE = "task.safetensors"  # what the task adds to the trunk


def export_weights(
    source: Checkpoint,
    out: Path,
    *,
    init_from: str = "",
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write `out/model.safetensors` (float32, names and shapes of the tp=1 model) and `out/config.json`,
    which are the trunk and its classifier, and, if the task adds weights of its own, `out/task.safetensors`.

    Frozen weights come from the export that they were taken from, or a copy of it in `init_from`. One
    process, no GPU; memory for the largest tensor. `progress` is told the number of bytes of each piece read
    for `verify` or written. CheckpointError if a file is damaged (without `verify` only if it is missing,
    short or of other tensors), and if the checkpoint is not one of its own configuration.
    """
    layouts = source.layouts | source.frozen.layouts
    config = _trunk_config(source, {name: layout.shape for name, layout in layouts.items()})
    if verify:
        with _bar(
            sum(file.bytes for file in source.files), f"verify {source.folder.name}", progress
        ) as count:
            if problems := source.damage(source.files, count):
                raise CheckpointError("\n".join(problems))
    folder = init_from or source.frozen.folder
    if source.frozen.exported:
        check_digest(source.frozen, folder)
    out.mkdir(parents=True, exist_ok=True)
    trunk = [name for name in layouts if name in logical_shapes(config)]
    files = {WEIGHTS_FILE: trunk, TASK_WEIGHTS_FILE: [name for name in layouts if name not in trunk]}
    files = {name: names for name, names in files.items() if names}
    partial = {name: out / f"{name}.partial" for name in (CONFIG_FILE, *files)}
    metadata = {"format": "pt", "step": str(source.step)}
    try:
        with (
            _bar(
                sum(4 * _numel(layout) for layout in layouts.values()), f"export to {out}", progress
            ) as count,
            frozen_reader(source.frozen, folder, config, _initial(source)) as read,
        ):
            for file, names in files.items():
                entries = {name: Entry("F32", layouts[name].shape) for name in names}
                tensors = (_tensor(source, name, read) for name in names)
                write_tensors(partial[file], entries, tensors, metadata, count)
        partial[CONFIG_FILE].write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        for name, path in partial.items():
            os.replace(path, out / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
        source.close()
    return out


def _numel(layout: Layout) -> int:
    return int(np.prod(layout.shape))


def _tensor(source: Checkpoint, name: str, read_frozen: Read) -> np.ndarray:
    """A whole logical tensor, float32."""
    if name in source.layouts:
        return source.tensor(WEIGHT, name)
    layout = source.frozen.layouts[name]
    whole = np.empty(layout.shape, np.float32)
    read_frozen(name, layout.boxes(0, 1, 0, whole.size), {WEIGHT: whole.reshape(-1)})
    return whole


def _initial(source: Checkpoint) -> Read:
    """Reads frozen weights that are those of the run's seed."""
    if not source.frozen.initial:
        return _none
    run = make_run(flat_config(source.run))
    with torch.device("meta"):
        init = Initializer(run.seed, Mesh.single(), deferred=True)
        parameters = logical_parameters(make_task(run.task, run.model, run.data).build(init, "none"))

    def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
        initial_values_of(parameters[name]).read(boxes, out[WEIGHT])

    return read


def _none(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
    raise AssertionError(f"{name} is no frozen weight of the seed")


def _trunk_config(source: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The configuration of the trunk that the checkpoint holds: the run's, without a classifier unless there
    are weights of one. CheckpointError unless its weights are among `shapes`."""
    config = model_config(source.run["model"])
    is_default = source.run.get("task", {}).get("name", DEFAULT_TASK) == DEFAULT_TASK
    if "head.weight" not in shapes and not is_default:
        config = dataclasses.replace(config, num_classes=0)
    try:
        check_depth(config, shapes)
        expected = logical_shapes(config)
        names = expected | shapes if is_default else expected  # other tasks add weights of their own
        if other := [name for name in names if expected.get(name) != shapes.get(name)]:
            name = other[0]
            raise ValueError(f"{name} has shape {shapes.get(name)}, the model needs {expected.get(name)}")
    except ValueError as error:
        path = source.folder / MANIFEST_FILE
        raise CheckpointError(f"{path} does not describe the weights of its run.model: {error}") from error
    return config


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


def load_exported(folder: Path, state: ZeroState, config: ModelConfig) -> str:
    """Start from an exported model: fill this rank's part of the weights; returns what was and was not
    loaded.

    A classifier of another size keeps its initial weights, the position embedding is resized to the new grid;
    tensors that only one of the two models has are left alone. Raises ValueError for a folder that is no
    export or a damaged one, and for any other difference in shape. Collective over DP.
    """
    layouts = state.layouts | state.frozen_layouts
    with exported_weights(folder, layouts, config) as weights:
        fresh = [name for name in layouts if name not in weights.names]
        state.load(weights.read, moments=False, leave=fresh)
    kept = [name for name in fresh if name not in weights.other_head] + weights.other_head
    notes = [weights.resized] if weights.resized else []
    notes += [f"newly initialised: {', '.join(kept)}"] if kept else []
    notes += [f"not in this model: {', '.join(weights.unused)}"] if weights.unused else []
    return "; ".join([f"{len(weights.names)} of {len(layouts)} tensors loaded from {folder}", *notes])
