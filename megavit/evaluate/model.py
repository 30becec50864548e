"""A model to be evaluated: its features, its classifier, and what tells it from every other.

Letters: b images, S image side, C channels, N tokens, D width of a feature, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megavit.data.device import normalised
from megavit.data.preprocessing import Preprocessing
from megavit.dense_predictor import DensePredictor, open_dense
from megavit.evaluate.sets.image_set import digest_of
from megavit.model.exported import export_folder
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.predictor import class_names_of_export, read_description
from megavit.tasks.config import DenseConfig, InferenceConfig
from megavit.tasks.dense import TASK_FILE
from megavit.tasks.exported import TASK_WEIGHTS_FILE, task_of_export
from megavit.train.checkpoint.frozen import export_digest

POOLED, PATCHES, BLOCK = "pooled", "patches", "block."


class FrozenModel(Protocol):
    """What is asked of a model. Under tensor parallelism all ranks of a TP group ask it together.

    Its layers are `pooled` (what the classifier reads), `patches` (the mean of the last patch tokens) and
    `block.K` (the mean of the patch tokens after block K, from 0 on, with the final norm).
    """

    name: str
    digest: str  # of the weights and of all that the features depend on, but for the transform
    preprocessing: Preprocessing
    mesh: Mesh
    num_classes: int  # 0 for a model without a classifier
    class_names: tuple[str, ...]
    depth: int  # blocks

    def features(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """uint8 [b, S, S, C] -> each layer's float32 [b, D], on the mesh's device."""
        ...

    def logits(self, pooled: Tensor) -> Tensor:
        """float32 [b, D] -> float32 [b, K]."""
        ...


class ExportedModel:
    """The model of an export, or of a run that has ended: this rank's shard of it.

    `model`, on the mesh of `model.mesh`, and the others are what the export in `folder` holds; `open` reads
    them. If its task was depth or segmentation, `model` is the trunk of `dense`. Collective over the world,
    for the digest of the weights.
    """

    def __init__(
        self,
        folder: Path,
        model: MegaVit,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
        name: str = "",
        dense: DensePredictor | None = None,
    ):
        self.name, self.mesh = name or folder.resolve().name, model.mesh
        self.preprocessing, self.class_names = preprocessing, tuple(class_names)
        self.num_classes, self.depth = len(self.class_names), model.config.depth
        self.digest = digest_of(export_digest(folder, self.mesh), model.config, model.dtype)
        self._model, self.dense = model, dense
        if dense:
            parts = self.mesh.on_main(lambda: [_digest(folder / f) for f in (TASK_FILE, TASK_WEIGHTS_FILE)])
            self.digest = digest_of(self.digest, *parts)

    @staticmethod
    def open(
        folder: str | Path,
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        inference: InferenceConfig | None = None,
    ) -> ExportedModel:
        """Of an export or a run folder, whose name is the model's. A model without a classifier of photos has
        no classes; one of depth or segmentation goes about pictures as `inference` says. ValueError, naming
        the file and the fix, for a folder that is no whole export."""
        name, folder = Path(folder).resolve().name, export_folder(Path(folder))
        if isinstance(task_of_export(folder), DenseConfig):
            dense = open_dense(folder, mesh, dtype, inference or InferenceConfig())
            trunk, preprocessing = dense.module.trunk, dense.preprocessing
            return ExportedModel(folder, trunk, preprocessing, (), name, dense)
        config, preprocessing = read_description(folder)
        config.check_tensor_parallel(mesh.tp_size)
        is_classifier = config.num_classes and preprocessing.link != "none"
        names = class_names_of_export(folder, config.num_classes) if is_classifier else []
        model = MegaVit.from_pretrained(folder, mesh=mesh, dtype=dtype)
        return ExportedModel(folder, model, preprocessing, names, name)

    @torch.no_grad()
    def features(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        used = self.preprocessing
        images = normalised(pixels, used.mean, used.std, self.mesh.device)
        return trunk_features(self._model, images, layers)

    @torch.no_grad()
    def logits(self, pooled: Tensor) -> Tensor:
        return self._model.classify(pooled.to(self.mesh.device))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "blake2b").hexdigest()


def trunk_features(model: MegaVit, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Each layer's float32 [b, D] of images [b, C, S, S] that are normalised."""
    numbers = sorted({int(layer.removeprefix(BLOCK)) for layer in layers if layer.startswith(BLOCK)})
    kept: dict[str, Tensor] = {}
    prefix = model.config.num_prefix_tokens

    class Keep:
        """Keeps the means, not the tokens, of the blocks that are asked for."""

        def tokens(self, layer: int, x: Tensor) -> None:
            if layer in numbers:
                kept[f"{BLOCK}{layer}"] = model.norm(x)[:, prefix:].mean(1, dtype=torch.float32)

    images = images.to(model.dtype)
    if numbers:
        with model.observe(Keep()):
            tokens = model.forward_features(images)
    else:
        tokens = model.forward_features(images)
    if POOLED in layers:
        kept[POOLED] = model.forward_head(tokens, pre_logits=True).float()
    if PATCHES in layers:
        kept[PATCHES] = tokens[:, prefix:].mean(1, dtype=torch.float32)
    return {layer: kept[layer] for layer in layers}


def chosen_layers(text: str, depth: int) -> list[str]:
    """The layers that `--layers` names: pooled, patches, block.K (K from 0, or from the end if negative) and
    all, which is every block and pooled. ValueError naming one that the model does not have."""
    every = [f"{BLOCK}{number}" for number in range(depth)]
    found: list[str] = []
    for word in text.split(","):
        word = word.strip()
        if word == "all":
            found += [*every, POOLED]
        elif word in (POOLED, PATCHES):
            found.append(word)
        else:
            number = word.removeprefix(BLOCK)
            whole = number.removeprefix("-").isdecimal() and word.startswith(BLOCK)
            if not whole or not -depth <= int(number) < depth:
                raise ValueError(
                    f"--layers: {word!r} is no layer of this model; it has pooled, patches, block.0 to "
                    f"block.{depth - 1}, and all"
                )
            found.append(every[int(number)])
    return list(dict.fromkeys(found))
