"""Small exports whose weights are drawn, so that photos are told apart without any training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megavit.data.class_names import write_class_names
from megavit.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from megavit.model.vit import MegaVit

NAMES = ("blue bird", "cat", "ñandú")


def write_export(
    folder: Path, names: Sequence[str] = NAMES, *, channels: int = 3, num_classes: int = 3, **changes: Any
) -> Path:
    """An export of a one-block model of 16x16 pixels; `changes` are fields of its preprocessing."""
    model = MegaVit(
        image_size=16,
        patch_size=4,
        dim=16,
        depth=1,
        heads=2,
        mlp_dim=32,
        channels=channels,
        num_classes=num_classes,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the classifier starts at zero
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    half = (0.5,) * channels
    usual = Preprocessing(16, channels, 0.875, "bilinear", True, half, half, "softmax")
    dataclasses.replace(usual, **changes).write(folder / PREPROCESSING_FILE)
    if names:
        write_class_names(folder, names)
    return folder
