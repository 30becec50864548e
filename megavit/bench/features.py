"""The feature pass of an evaluation against a bare loop of decoding and forward passes, and what a second
protocol costs beside it.

One process, one thread, CPU time.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megavit.bench.data import make_photo
from megavit.bench.report import Row
from megavit.bench.rounds import ratio_to, rounds
from megavit.data.device import normalised
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.cache import Pass, PassSettings
from megavit.evaluate.images import Transform
from megavit.evaluate.model import POOLED, trunk_features
from megavit.evaluate.protocols.fewshot import fewshot
from megavit.evaluate.protocols.knn import knn
from megavit.evaluate.results import Measurement
from megavit.evaluate.sets.image_set import Files, ImageSet, one_label
from megavit.model.config import model_preset
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh

BATCH = 32
_CLASSES = 10
_BARE, _PASS = "bare loop of decode and forward", "feature pass into the cache"
_KNN, _FEWSHOT = "kNN on the cache", "few-shot on the cache"


class _Model:
    """A preset with random weights, as the pass takes one."""

    def __init__(self, preset: str):
        config = model_preset(preset, num_classes=0)
        half = (0.5,) * 3
        self.name = self.digest = preset
        self.preprocessing = Preprocessing(
            config.image_size,
            3,
            0.875,
            "bilinear",
            True,
            half,
            half,
            "none",
        )
        self.mesh, self.num_classes, self.depth = Mesh.single(), 0, config.depth
        self.class_names: tuple[str, ...] = ()
        self._model = MegaVit.from_config(config).eval()

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, layers: object) -> dict[str, torch.Tensor]:
        used = self.preprocessing
        images = normalised(pixels, used.mean, used.std, self.mesh.device)
        return trunk_features(self._model, images, [POOLED])

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there is no classifier")


def exhaust(found: Iterator[Measurement]) -> None:
    for _ in found:
        pass


def measure(images: int, count: int, preset: str) -> Iterator[Row]:
    """A row for each way on `images` JPEGs of about 400 x 500 pixels, from `count` rounds."""
    model = _Model(preset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = tuple(f"{number:06d}.jpg" for number in range(images))
        for number, file in enumerate(names):
            (folder / file).write_bytes(make_photo(number))
        files = Files(str(folder), names)
        labels = one_label(np.arange(images) % _CLASSES)
        classes = tuple(map(str, range(_CLASSES)))
        photos = ImageSet("photos", "train", files, labels, classes, "photos", files.digest())
        transform = Transform(model.preprocessing, photos.adjust)
        settings = PassSettings(folder / "cache", batch_size=BATCH, workers=0)

        def bare() -> None:
            for start in range(0, images, BATCH):
                rows = range(start, min(start + BATCH, images))
                model.features(torch.stack([transform(files.read(row), "") for row in rows]), [POOLED])

        def into_cache() -> None:
            shutil.rmtree(settings.folder, ignore_errors=True)
            Pass(model, photos, settings).features([POOLED])

        into_cache()
        features = Pass(model, photos, settings).features([POOLED])[POOLED]
        seconds = rounds(
            {
                _BARE: bare,
                _PASS: into_cache,
                _KNN: lambda: exhaust(knn(features, [features])),
                _FEWSHOT: lambda: exhaust(fewshot(features, [features])),
            },
            count,
        )
    for way, mine in seconds.items():
        row: Row = {"way": way, "images_per_s_per_core": images / statistics.median(mine)}
        yield row | ratio_to(_BARE, seconds, way)
