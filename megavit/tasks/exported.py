"""A dense task's export as a module that predicts: the trunk and its head, on one process or a mesh."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from megavit.data.config import DataConfig
from megavit.model.exported import export_folder, open_export
from megavit.model.vit import default_dtype
from megavit.parallel.init import Initializer, logical_parameters, logical_statistics
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import TaskConfig, config_class
from megavit.tasks.dense import TASK_FILE, DenseModule, DenseTask
from megavit.tasks.task import make_task

TASK_WEIGHTS_FILE = "task.safetensors"  # what the task adds to the trunk


def task_of_export(folder: str | Path) -> TaskConfig | None:
    """The task of an export (or of a run folder) that says what it is in a `task.json`, as dense ones do.
    Reads no weights. ValueError, naming the file, if it describes none."""
    path = export_folder(Path(folder)) / TASK_FILE
    try:
        fields = json.loads(path.read_text())
        return config_class(fields["name"])(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a dense task: {error}") from error


@torch.no_grad()
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
    mesh, path = mesh or Mesh.single(), export_folder(Path(folder))
    config = task_of_export(path)
    if config is None:
        raise ValueError(f"{path / TASK_FILE} is missing: this is no export of a dense task")
    overrides = {} if image_size is None else {"image_size": image_size}
    with open_export(path, **overrides) as (model, trunk):
        task = make_task(config, model, DataConfig())
        if not isinstance(task, DenseTask):
            raise ValueError(f"{path / TASK_FILE}: {config.name} is no dense task")
        with mesh.device, default_dtype(dtype):
            module = task.build(Initializer(0, mesh, deferred=True), "none")
        assert isinstance(module, DenseModule)
        module.trunk.load_logical(trunk.get_tensor)
    with safe_open(path / TASK_WEIGHTS_FILE, "pt") as weights:
        for name, part in (logical_parameters(module.decoder) | logical_statistics(module.decoder)).items():
            part.copy_(layout_of(part).take(weights.get_tensor(name), mesh.tp_rank, mesh.tp_size))
    return task, module.eval()
