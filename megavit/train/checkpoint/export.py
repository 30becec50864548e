"""Weights in and out of a run: a checkpoint becomes the single-process model that `MegaVit.from_pretrained`
loads, and such a model becomes the start of a new run.

Both go one tensor at a time, so that host memory holds 0.6 GB of ViT-22B's 89.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from megavit.data.class_names import CLASSES_FILE
from megavit.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from megavit.model.config import ModelConfig, model_config
from megavit.model.exported import logical_shapes, trunk_config
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE
from megavit.parallel.init import Initializer, initial_values_of, logical_parameters
from megavit.parallel.layout import Box, Layout
from megavit.parallel.mesh import Mesh
from megavit.recipe import DEFAULT_TASK, make_run
from megavit.tasks.exported import TASK_WEIGHTS_FILE
from megavit.tasks.task import Task, make_task
from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, Checkpoint
from megavit.train.checkpoint.frozen import Read, check_digest, exported_weights, frozen_reader
from megavit.train.checkpoint.manifest import WEIGHT, CheckpointError
from megavit.train.checkpoint.tensorfile import Entry, progress_bar, write_tensors
from megavit.train.config import RunConfig, saved_fields
from megavit.train.zero_state import ZeroState

_PARTIAL = "export.partial"  # a folder in the export while it is written


def export_weights(
    source: Checkpoint,
    out: Path,
    *,
    class_names: Sequence[str] | None = None,
    init_from: str = "",
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write `out/model.safetensors` (float32, names and shapes of the tp=1 model), `out/config.json`,
    `out/preprocessing.json` and, if the classes have names, `out/classes.txt`; `megavit.load` reads them. If
    the task adds weights to the trunk, they are written to `out/task.safetensors`.

    The names are those that the run folder keeps, unless `class_names` are given. Frozen weights come from
    the export that they were taken from, or a copy of it in `init_from`. One process, no GPU; memory for the
    largest tensor. `progress` is told the number of bytes of each piece read for `verify` or written.
    CheckpointError if a file is damaged (without `verify` only if it is missing, short or of other tensors),
    and if the checkpoint is not one of its own configuration; ValueError if the names are not one a class.
    """
    layouts = source.layouts | source.frozen.layouts
    config = _trunk_config(source, {name: layout.shape for name, layout in layouts.items()})
    preprocessing = _preprocessing(source)
    task, _ = _task(source)
    task.open(source.folder.absolute().parents[1], class_names)  # RUN_DIR/checkpoints/step_00001000
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
    partial = out / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir()
    try:
        size = sum(4 * math.prod(layout.shape) for layout in layouts.values())
        with (
            _bar(size, f"export to {out}", progress) as count,
            frozen_reader(source.frozen, folder, config, _initial(source)) as read,
        ):
            _write_weights(source, partial, layouts, {*logical_shapes(config)}, read, count)
        written = dataclasses.replace(config, matmul="default")  # for any device
        (partial / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(written), indent=2) + "\n")
        preprocessing.write(partial / PREPROCESSING_FILE)
        task.keep(partial)
        for file in (CLASSES_FILE, TASK_WEIGHTS_FILE):
            if not (partial / file).exists():
                (out / file).unlink(missing_ok=True)  # an earlier export's
        for path in sorted(partial.iterdir(), key=lambda path: path.name == WEIGHTS_FILE):  # the weights last
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        source.close()
    return out


def _write_weights(
    source: Checkpoint,
    out: Path,
    layouts: dict[str, Layout],
    trunk: set[str],
    read_frozen: Read,
    count: Callable[[int], None],
) -> None:
    """The weights of the trunk in one file, those that the task adds in another, one tensor at a time."""

    def tensor(name: str) -> np.ndarray:
        if name in source.layouts:
            return source.tensor(WEIGHT, name)
        whole = np.empty(layouts[name].shape, np.float32)
        read_frozen(name, layouts[name].boxes(0, 1, 0, whole.size), {WEIGHT: whole.reshape(-1)})
        return whole

    metadata = {"format": "pt", "step": str(source.step)}
    files = {WEIGHTS_FILE: [name for name in layouts if name in trunk]}
    files[TASK_WEIGHTS_FILE] = [name for name in layouts if name not in trunk]
    for file, names in files.items():
        if names:
            entries = {name: Entry("F32", layouts[name].shape) for name in names}
            write_tensors(out / file, entries, (tensor(name) for name in names), metadata, count)


def _preprocessing(source: Checkpoint) -> Preprocessing:
    try:
        return Preprocessing.of_run(source.run)
    except ValueError as error:
        raise CheckpointError(f"{source.folder / MANIFEST_FILE}: {error}") from error


def _task(source: Checkpoint) -> tuple[Task, RunConfig]:
    """The task of the run, and the run. CheckpointError if the manifest's run is none that can be made."""
    try:
        run = make_run(saved_fields(source.run))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source.folder / MANIFEST_FILE}: its run cannot be used: {error}") from error
    # Only what the run folder keeps counts now: the data may be elsewhere, or others.
    data = dataclasses.replace(run.data, shards="", class_names="")
    return make_task(run.task, run.model, data), run


def _initial(source: Checkpoint) -> Read:
    """Reads frozen weights that are those of the run's seed."""
    if not source.frozen.initial:
        return _none
    task, run = _task(source)
    with torch.device("meta"):
        init = Initializer(run.seed, Mesh.single(), deferred=True)
        parameters = logical_parameters(task.build(init, "none"))

    def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
        initial_values_of(parameters[name]).read(boxes, out[WEIGHT])

    return read


def _none(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
    raise AssertionError(f"{name} is no frozen weight of the seed")


def _trunk_config(source: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The configuration of the trunk that the checkpoint holds. CheckpointError unless its weights are among
    `shapes`, and, for the default task, which adds none to them, the only ones."""
    is_default = source.run.get("task", {}).get("name", DEFAULT_TASK) == DEFAULT_TASK
    try:
        return trunk_config(model_config(source.run["model"]), shapes, only=is_default)
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
