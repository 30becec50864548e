"""Small models and sets to evaluate, quick to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megavit.evaluate.cache import Pass, PassSettings
from megavit.evaluate.features import Features
from megavit.evaluate.model import ExportedModel
from megavit.evaluate.sets.image_set import ImageSet, Pixels, one_label
from megavit.parallel.mesh import Mesh
from tests.exports import NAMES, write_export


def random_set(count: int = 150, seed: int = 0, name: str = "noise") -> ImageSet:
    generator = np.random.default_rng(seed)
    pixels = Pixels(name, generator.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8))
    labels = one_label(generator.integers(0, 3, count).tolist())
    return ImageSet(name, "test", pixels, labels, NAMES, "noise", pixels.digest())


def small_model(folder: Path, mesh: Mesh | None = None) -> ExportedModel:
    """Of three classes, 16 pixels, one block."""
    if not (folder / "config.json").exists():
        write_export(folder)
    return ExportedModel.open(folder, mesh or Mesh.single())


def run_pass(model: Any, images: ImageSet, cache: Path, *layers: str, **settings: Any) -> dict[str, Features]:
    return Pass(model, images, PassSettings(cache, **settings)).features(layers or ("pooled",))


def rows_of(features: Features) -> torch.Tensor:
    """float32 [usable, D] on the CPU, in the order of the images, whoever has them."""
    return torch.cat([piece.values.cpu() for piece in features.everywhere()])
