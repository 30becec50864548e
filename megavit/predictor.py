"""A trained model to be used: `megavit.load(folder)(photos)` gives probabilities with names, or maps.

Letters: B photos, C classes of the model, S image side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megavit.data.class_names import CLASSES_FILE, read_class_names
from megavit.data.device import normalised
from megavit.data.photos import Photo, PhotoReader, one_by_one
from megavit.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from megavit.model.config import ModelConfig
from megavit.model.exported import export_folder, open_export
from megavit.model.vit import CONFIG_FILE, MegaVit
from megavit.parallel.mesh import Mesh

if TYPE_CHECKING:
    from megavit.dense_predictor import DensePredictor
    from megavit.tasks.config import InferenceConfig

BATCH_SIZE = 32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16"}


class Predictions(NamedTuple):
    """What a model says of B photos, on the CPU.

    `probabilities` [B, C] float32 are those of the loss that the model was trained with: a softmax over the
    classes, or a sigmoid of each. `logits` [B, C] float32 are the model's outputs. They rank the classes also
    where several probabilities round to 1.
    """

    logits: Tensor
    probabilities: Tensor
    names: tuple[str, ...]

    def ranked(self, k: int = 5) -> Tensor:
        """The ids of the k likeliest classes, best first, int64 [B, k]; all of them if there are fewer."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self.logits.argsort(dim=1, descending=True, stable=True)[:, :k]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each photo the names and probabilities of the k likeliest classes, best first."""
        return [
            [(self.names[number], float(row[number])) for number in numbers]
            for row, numbers in zip(self.probabilities, self.ranked(k).tolist(), strict=True)
        ]


class Predictor:
    """A classifier with all that it needs to be used on photos; `megavit.load` makes it.

    `model` is the `MegaVit` itself, in evaluation mode, for tensors that are prepared already; `names` are
    those of its classes, or their numbers if nobody has named them; `folder` is the export, if it is one's.
    """

    def __init__(
        self,
        model: MegaVit,
        preprocessing: Preprocessing,
        names: Iterable[str],
        batch_size: int = BATCH_SIZE,
        folder: Path | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.preprocessing = model.eval(), preprocessing
        self.names, self.batch_size, self.folder = tuple(names), batch_size, folder
        self._reader = PhotoReader(preprocessing)

    def __call__(self, photos: Photo | Iterable[Photo]) -> Predictions:
        """The predictions for one photo or several, B >= 1.

        A photo is a path, a PIL image, an array or a tensor, see `PhotoReader`; an array [B, H, W, C] or a
        tensor [B, C, H, W] are B photos. Each is cropped and resized as the validation images of the training
        run were, so give the photo as it is. `batch_size` of them go through the model at a time. ValueError,
        naming the file or the number of the photo, for what is no photo; OSError for a file that cannot be
        read.
        """
        found = one_by_one(photos)
        parts = []
        for start in range(0, len(found), self.batch_size):
            rows = self.prepare(found[start : start + self.batch_size])
            for number, row in enumerate(rows, start):
                if isinstance(row, OSError):
                    raise row
                if isinstance(row, ValueError):
                    is_file = isinstance(found[number], str | os.PathLike)
                    where = "" if is_file or len(found) == 1 else f"photos[{number}]: "
                    raise ValueError(f"{where}{row}") from row
            parts.append(self.predict(torch.stack([row for row in rows if isinstance(row, Tensor)])))
        logits = torch.cat([part.logits for part in parts])
        return Predictions(logits, torch.cat([part.probabilities for part in parts]), self.names)

    def prepare(self, photos: Iterable[Photo]) -> list[Tensor | ValueError | OSError]:
        """Each photo cropped and resized, uint8 [S, S, C], or the error if it is none."""

        def load(photo: Photo) -> Tensor | ValueError | OSError:
            try:
                return self._reader.load(photo)
            except (ValueError, OSError) as error:
                return error

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            return list(pool.map(load, photos))

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Predictions:
        """The predictions for uint8 [B, S, S, C], as `prepare` makes them, in one batch."""
        logits: Tensor = self.model(self.as_input(pixels)).float().cpu()
        link = logits.softmax(1) if self.preprocessing.link == "softmax" else logits.sigmoid()
        return Predictions(logits, link, self.names)

    def as_input(self, pixels: Tensor) -> Tensor:
        """What the model takes, [B, C, S, S] on its device and in its dtype, of uint8 [B, S, S, C]."""
        weight, used = self.model.embed.weight, self.preprocessing
        return normalised(pixels, used.mean, used.std, weight.device).to(weight.dtype)


def load(
    folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
    inference: InferenceConfig | None = None,
) -> Predictor | DensePredictor:
    """The model in an export, or in the folder of a run that has ended, ready for photos: a `Predictor` of
    classes, or, if its task was depth or segmentation, a `DensePredictor` of maps, which goes about a photo
    as `inference` says and takes one at a time. The rest is as of `load_classifier`."""
    from megavit.dense_predictor import open_dense
    from megavit.tasks.config import DenseConfig, InferenceConfig
    from megavit.tasks.exported import task_of_export

    if not isinstance(task_of_export(Path(folder)), DenseConfig):
        if inference is not None:
            raise ValueError(f"{folder} holds no model of depth or segmentation: inference is for these")
        return load_classifier(folder, device, dtype, batch_size, mesh)
    mesh = mesh or Mesh.single(device_called(device))
    return open_dense(folder, mesh, dtype_called(dtype), inference or InferenceConfig())


def load_classifier(
    folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    mesh: Mesh | None = None,
) -> Predictor:
    """The classifier in an export, or in the folder of a run that has ended, ready for photos.

    `device` is the first GPU where there is one, and else the CPU. `dtype` is float32, or bfloat16 ("bf16"),
    which is faster on GPUs and less exact; a run whose DeepSpeed JSON enables it evaluates in it too. Where
    the export names no classes, their names are their numbers. On a `mesh` each rank has its shard on the
    mesh's device, and the ranks of a TP group use the model together, on the same photos.

    ValueError, naming the file and the fix, for a folder that is no whole export (one of an earlier version
    lacks preprocessing.json), for a model without classes, and for a device that is not here.
    """
    from megavit.tasks.exported import task_of_export

    # Mistakes come before the weights, which take long to read.
    chosen_device, chosen_dtype = mesh.device if mesh else device_called(device), dtype_called(dtype)
    folder = export_folder(Path(folder))
    config, preprocessing = read_description(folder)
    if not config.num_classes and (task := task_of_export(folder)):
        raise ValueError(
            f"{folder} holds a model of --task {task.name}, not a classifier of photos; "
            f"megavit.tasks.exported reads it"
        )
    if not config.num_classes:
        raise ValueError(
            f"{folder} holds a model without a classifier (num_classes is 0): it has features and no "
            f"probabilities; use MegaVit.from_pretrained"
        )
    if preprocessing.link == "none":
        raise ValueError(f"{folder} holds no classifier of photos: {PREPROCESSING_FILE} has the link none")
    names = class_names_of_export(folder, config.num_classes)
    config.check_tensor_parallel(mesh.tp_size if mesh else 1)
    model = MegaVit.from_pretrained(folder, mesh=mesh, device=chosen_device, dtype=chosen_dtype)
    return Predictor(model, preprocessing, names, batch_size, folder)


def read_description(folder: Path) -> tuple[ModelConfig, Preprocessing]:
    """What an export says of its model and of the model's images. ValueError, naming the file, if it is no
    whole export, or if the two are not of one model."""
    with open_export(folder) as (config, _):
        preprocessing = Preprocessing.read(folder)
    if (preprocessing.image_size, preprocessing.channels) != (config.image_size, config.channels):
        raise ValueError(
            f"{folder / PREPROCESSING_FILE} is of another model than {CONFIG_FILE}: image_size "
            f"{preprocessing.image_size} and {config.image_size}, channels {preprocessing.channels} and "
            f"{config.channels}"
        )
    return config, preprocessing


def class_names_of_export(folder: Path, num_classes: int) -> list[str]:
    """The names of an export's classes, their numbers if nobody has named them. ValueError if they are not
    one a class."""
    path = folder / CLASSES_FILE
    if not path.exists():
        return [str(number) for number in range(num_classes)]
    names = read_class_names(path)
    if len(names) != num_classes:
        raise ValueError(f"{path} has {len(names)} names for the {num_classes} classes of the model")
    return names


def device_called(device: str | torch.device | None) -> torch.device:
    """The device that is meant; none is the first GPU where there is one. ValueError if it is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(f"device {device!r} is not here; there are: {', '.join(here)}") from error
    return found


def dtype_called(dtype: str | torch.dtype | None) -> torch.dtype:
    """The type of weights that is meant; none is float32. ValueError for any but it and bfloat16."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    found = _DTYPES.get(_SHORT.get(name, name))
    if found is None:
        raise ValueError(f"dtype must be float32 or bfloat16 (bf16), got {dtype}")
    return found
