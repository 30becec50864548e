"""The export of a task with a decoder as a module that predicts: the trunk and its head, on one process or a
mesh."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from megavit.data.config import DataConfig
from megavit.data.preprocessing import Preprocessing
from megavit.model.exported import export_folder, open_export
from megavit.model.vit import default_dtype
from megavit.parallel.init import Initializer, logical_parameters, logical_statistics
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import TaskConfig, config_class
from megavit.tasks.dense import TASK_FILE, DecoderModule, DecoderTask, DenseModule, DenseTask
from megavit.tasks.task import make_task
from megavit.tasks.video import VideoModule, VideoTask

TASK_WEIGHTS_FILE = "task.safetensors"  # what the task adds to the trunk


def task_of_export(folder: str | Path) -> TaskConfig | None:
    """The task of an export (or of a run folder) that says what it is in a `task.json`, as those with a
    decoder do. Reads no weights. ValueError, naming the file, if it describes none."""
    path = export_folder(Path(folder)) / TASK_FILE
    try:
        fields = json.loads(path.read_text())
        return config_class(fields["name"])(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a task with a decoder: {error}") from error


def load_dense(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[DenseTask, DenseModule]:
    """The task of an export (or of a run folder) and its module in evaluation mode, on the mesh's device,
    with `maps` and, for depth, `metres`. With another `image_size` the position embedding is resized.

    ValueError, naming the file, if it is no export of a dense task.
    """
    task, module = _load(folder, mesh, image_size, dtype)
    if not (isinstance(task, DenseTask) and isinstance(module, DenseModule)):
        raise ValueError(f"{folder} is an export of the task {task.config.name}, which is no dense task")
    return task, module


def load_video(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[VideoTask, VideoModule]:
    """As `load_dense`, for the task video: `task.read` makes views of a file's bytes, of which
    `module.probabilities` finds the class."""
    task, module = _load(folder, mesh, image_size, dtype)
    if not (isinstance(task, VideoTask) and isinstance(module, VideoModule)):
        raise ValueError(f"{folder} is an export of the task {task.config.name}, not of videos")
    return task, module


@torch.no_grad()
def _load(
    folder: str | Path, mesh: Mesh | None, image_size: int | None, dtype: torch.dtype
) -> tuple[DecoderTask, DecoderModule]:
    mesh, path = mesh or Mesh.single(), export_folder(Path(folder))
    config = task_of_export(path)
    if config is None:
        raise ValueError(f"{path / TASK_FILE} is missing: this is no export of a task with a decoder")
    overrides = {} if image_size is None else {"image_size": image_size}
    with open_export(path, **overrides) as (model, trunk):
        used = Preprocessing.read(path)
        task = make_task(config, model, DataConfig(eval_crop=used.crop, antialias=used.antialias))
        if not isinstance(task, DecoderTask):
            raise ValueError(f"{path / TASK_FILE}: {config.name} is no task with a decoder")
        with mesh.device, default_dtype(dtype):
            module = task.build(Initializer(0, mesh, deferred=True), "none")
        assert isinstance(module, DecoderModule)
        module.trunk.load_logical(trunk.get_tensor)
    with safe_open(path / TASK_WEIGHTS_FILE, "pt") as weights:
        for name, part in (logical_parameters(module.decoder) | logical_statistics(module.decoder)).items():
            part.copy_(layout_of(part).take(weights.get_tensor(name), mesh.tp_rank, mesh.tp_size))
    return task, module.eval()
