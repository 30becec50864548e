"""A model of depth or segmentation to be used: `megavit.load(folder)(photos)` gives a map for each photo, at
the photo's own size.

Letters: H and W the sides of a photo, h and w those at which the model sees it, C channels, K outputs of the
head, S side of the model's square.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.data.decode import resize
from megavit.data.device import normalised
from megavit.data.photos import Photo, PhotoReader, one_by_one
from megavit.data.preprocessing import Preprocessing
from megavit.model.dense_layers import resize as resize_map
from megavit.model.exported import export_folder
from megavit.parallel.mesh import Mesh
from megavit.predictor import class_names_of_export, read_description
from megavit.tasks.config import InferenceConfig, SegmentConfig
from megavit.tasks.dense import DenseModule, DenseTask
from megavit.tasks.depth import DepthModule
from megavit.tasks.exported import load_dense
from megavit.tasks.windows import filled_up, mirrored, sliding_window

_WHOLE = InferenceConfig()
_CLASSES_AT_ONCE = 8  # whose maps are enlarged together


class Fitted(NamedTuple):
    """A photo as a dense model sees it, and its own sides."""

    pixels: Tensor  # uint8 [h, w, C]
    height: int
    width: int


class Fit:
    """Brings a whole photo to the size at which a dense model sees it: the short side has `short_side`
    pixels, and the long one what keeps the shape. It holds no weights, and travels to worker processes."""

    def __init__(self, preprocessing: Preprocessing, short_side: int):
        self.short_side, self._antialias = short_side, preprocessing.antialias
        self._reader = PhotoReader(preprocessing)

    def __call__(self, photo: Photo) -> Fitted:
        """Errors as of `PhotoReader.load`."""
        pixels = self._reader.whole(photo)
        height, width, channels = pixels.shape
        factor = self.short_side / min(height, width)
        out = np.empty((max(1, round(height * factor)), max(1, round(width * factor)), channels), np.uint8)
        resize(pixels, self._antialias, out)
        return Fitted(torch.from_numpy(out), height, width)


class DensePredictor:
    """A model of depth or of classes with all that it needs to be used on photos; `megavit.load` makes it.

    `kind` is depth or segment, `names` are those of the classes (their numbers if nobody has named them),
    `limits` the least and the largest depth in metres that the model predicts. `module` is the trunk and the
    head, in evaluation mode. On a mesh the ranks of a TP group use the model together, on the same photos.
    ValueError for an `inference` that does not fit the model.
    """

    def __init__(
        self,
        task: DenseTask,
        module: DenseModule,
        preprocessing: Preprocessing,
        names: Iterable[str] = (),
        inference: InferenceConfig = _WHOLE,
    ):
        self.task, self.module, self.preprocessing = task, module, preprocessing
        self.names, self.inference = tuple(names), inference
        self.kind = "depth" if isinstance(module, DepthModule) else "segment"
        self.limits = module.limits if isinstance(module, DepthModule) else None
        side = preprocessing.image_size
        if inference.stride > side:
            raise ValueError(
                f"--stride {inference.stride} is above the side of the model's square, {side}: there would "
                f"be gaps"
            )
        self._stride = inference.stride or max(1, round(side * 2 / 3))
        self.fit = Fit(preprocessing, inference.short_side or round(side / preprocessing.crop))

    def __call__(self, photos: Photo | Iterable[Photo]) -> list[Tensor]:
        """A map for each of one photo or several, on the CPU: depth in metres, float32 [H, W], or class
        numbers, uint8 [H, W].

        Photos are as `Predictor` takes them. ValueError, naming the file or the number of the photo, for what
        is no photo; OSError for a file that cannot be read.
        """
        found = one_by_one(photos)
        maps = []
        for number, photo in enumerate(found):
            try:
                maps.append(self.predict(self.fit(photo)).cpu())
            except ValueError as error:
                is_file = isinstance(photo, str | os.PathLike)
                where = "" if is_file or len(found) == 1 else f"photos[{number}]: "
                raise ValueError(f"{where}{error}") from error
        return maps

    @torch.no_grad()
    def predict(self, fitted: Fitted) -> Tensor:
        """The map of one photo, on the model's device. Collective over the TP group. ValueError if the device
        has no memory for it."""
        used, device = self.preprocessing, self.module.trunk.mesh.device
        images = normalised(fitted.pixels[None], used.mean, used.std, device)  # [1, C, h, w]
        predict = mirrored(self._maps) if self.inference.mirror else self._maps
        try:
            if self.inference.inference == "slide":
                maps = sliding_window(predict, images, used.image_size, self._stride)
            else:
                maps = filled_up(predict, images, self.task.model.patch_size)
            size = (fitted.height, fitted.width)
            if self.limits is None:
                return largest(maps, size)[0]
            return resize_map(maps, size)[0, 0].clamp(*self.limits)  # which rounding may have left
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the device has no memory for a picture of {fitted.width}x{fitted.height} pixels at a short "
                f"side of {self.fit.short_side}: use --inference slide, or a smaller --short_side"
            ) from error

    def as_text(self) -> str:
        """What is done to a photo, in words."""
        used, inference = self.preprocessing, self.inference
        words = [f"whole picture, bilinear to a short side of {self.fit.short_side} px"]
        if inference.inference == "slide":
            words.append(f"squares of {used.image_size} px every {self._stride} px")
        if inference.mirror:
            words.append("mean with the mirrored picture")
        return ", ".join(words)

    def _maps(self, images: Tensor) -> Tensor:
        """float32 [b, K, h, w] of images [b, C, h, w] whose sides are multiples of the patch: metres, or
        logits."""
        weights = images.new_ones(len(images))
        if isinstance(self.module, DepthModule):
            return self.module.metres(images, weights)[:, None]
        return self.module.maps(images, weights)


def open_dense(
    folder: str | os.PathLike[str],
    mesh: Mesh,
    dtype: torch.dtype = torch.float32,
    inference: InferenceConfig = _WHOLE,
) -> DensePredictor:
    """Of an export of a dense task, or of the folder of such a run that has ended. ValueError, naming the
    file, if it is none, and for an `inference` that does not fit it."""
    path = export_folder(Path(folder))
    config, preprocessing = read_description(path)
    config.check_tensor_parallel(mesh.tp_size)
    task, module = load_dense(path, mesh, dtype=dtype)
    names: list[str] = []
    if isinstance(task.config, SegmentConfig):
        names = class_names_of_export(path, task.config.classes)
    return DensePredictor(task, module, preprocessing, names, inference)


def largest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Which of K <= 255 maps [B, K, h, w], enlarged to `size`, is the largest at each pixel: uint8 [B, H, W];
    the first of equal ones. Some are enlarged at a time: all of them would be gigabytes of a large photo."""
    best = maps.new_full((len(maps), *size), -math.inf)
    number = torch.zeros_like(best, dtype=torch.uint8)
    for start in range(0, maps.shape[1], _CLASSES_AT_ONCE):
        found, at = resize_map(maps[:, start : start + _CLASSES_AT_ONCE], size).max(1)
        better = found > best
        best = torch.where(better, found, best)
        number = torch.where(better, (at + start).to(torch.uint8), number)
    return number
