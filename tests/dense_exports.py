"""Small exports of depth and segmentation whose weights are drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from megavit.data.class_names import write_class_names
from megavit.data.config import DataConfig
from megavit.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from megavit.model.config import ModelConfig
from megavit.parallel.init import Initializer, logical_parameters, logical_statistics
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import DenseConfig, DepthConfig, SegmentConfig
from megavit.tasks.task import make_task

MODEL = ModelConfig(
    image_size=16, patch_size=4, channels=3, num_classes=0, dim=16, depth=2, num_heads=4, mlp_dim=32
)
DEPTH = DepthConfig(head="linear", max_m=10.0)
SEGMENT = SegmentConfig(head="linear", classes=3)


def write_dense_export(
    folder: Path, task: DenseConfig = DEPTH, names: Sequence[str] = (), crop: float = 1.0
) -> Path:
    """An export of a two-block model of 16x16 pixels, patch 4."""
    folder.mkdir(parents=True, exist_ok=True)
    module = make_task(task, MODEL, DataConfig()).build(Initializer(0, Mesh.single()), "none")
    torch.manual_seed(0)
    weights = logical_parameters(module) | logical_statistics(module)
    with torch.no_grad():
        for name, value in weights.items():  # some start at zero
            value.add_(torch.rand_like(value) if "running" in name else torch.randn_like(value) * 0.3)
    for file, ours in (("model.safetensors", False), ("task.safetensors", True)):
        part = {n: value.detach() for n, value in weights.items() if n.startswith("decoder.") == ours}
        save_file(part, folder / file)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(MODEL)))
    (folder / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    half = (0.5,) * 3
    used = Preprocessing(MODEL.image_size, 3, crop, "bilinear", True, half, half, "none")
    used.write(folder / PREPROCESSING_FILE)
    if names:
        write_class_names(folder, names)
    return folder
