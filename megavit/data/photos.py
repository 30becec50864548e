"""Photos of any kind, one at a time, as the rows of a batch: what a run does with its validation images.

Letters: S image side, C channels, H and W the sides of a photo, B photos.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megavit.data.decode import Box, Decoder, resize
from megavit.data.geometry import eval_box
from megavit.data.images import FORMATS, DecodeError, pillow_errors
from megavit.data.preprocessing import Preprocessing

Photo = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

# Beyond those of shards. Pillow knows 40 more, and starts Ghostscript for one.
_FORMATS = (*FORMATS, "GIF", "BMP", "TIFF")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # of their files
_MAX_PIXELS = 178_956_970  # Pillow refuses larger images


class PhotoReader:
    """Crops and resizes photos as `preprocessing` says, with the code that training uses.

    A photo is one of:
        a path, or a file's bytes: JPEG, PNG, WebP, GIF (the first frame), BMP or TIFF;
        a PIL image of any mode, which is turned upright if its EXIF data say so;
        a numpy array [H, W] or [H, W, 1, 3 or 4];
        a torch tensor [H, W] or [1, 3 or 4, H, W], as torchvision has them.
    Numbers are uint8, uint16 (the upper 8 bits are kept) or floating point in [0, 1]. Grey becomes colour and
    colour grey, as the model wants; alpha is dropped. `border` pixels are cut off on every side first.
    """

    def __init__(self, preprocessing: Preprocessing, border: int = 0):
        self._crop, self._bicubic = preprocessing.crop, preprocessing.interpolation == "bicubic"
        self._border = border
        self._decoder = Decoder(
            preprocessing.channels,
            preprocessing.image_size,
            preprocessing.antialias,
            max_pixels=_MAX_PIXELS,
            formats=_FORMATS,
        )

    def load(self, photo: Photo, choose_box: Callable[[int, int], Box] | None = None) -> Tensor:
        """uint8 [S, S, C]; with `choose_box(width, height)`, of this part of the photo. ValueError, naming
        the file if there is one, for what is no photo; OSError for a file that cannot be read."""
        crop = self._crop_of(photo, choose_box or self._box)
        size, channels = self._decoder.size, self._decoder.channels
        if self._bicubic:
            resized = bicubic(crop, size) if choose_box else bicubic_centre(crop, size, self._crop)
            return torch.from_numpy(resized)
        row = np.empty((size, size, channels), np.uint8)
        resize(crop, self._decoder.antialias, row)
        return torch.from_numpy(row)

    def whole(self, photo: Photo) -> np.ndarray:
        """All pixels of a photo, uint8 [H, W, C], upright. Errors as of `load`."""
        return self._crop_of(photo, lambda width, height: (0, 0, width, height))

    def _crop_of(self, photo: Photo, box: Callable[[int, int], Box]) -> np.ndarray:
        if isinstance(photo, bytes):
            return self._decoder.crop(photo, box)
        if not isinstance(photo, str | os.PathLike):
            return self._decoder.crop_image(_image(photo), box)
        path = Path(photo)
        try:
            return self._decoder.crop(path.read_bytes(), box)
        except DecodeError as error:
            raise DecodeError(f"{path}: {error}") from error

    def _box(self, width: int, height: int) -> Box:
        border = min(self._border, (min(width, height) - 1) // 2)
        inside = width - 2 * border, height - 2 * border
        # Bicubic models resize before they crop.
        left, top, right, bottom = (0, 0, *inside) if self._bicubic else eval_box(*inside, self._crop)
        return left + border, top + border, right + border, bottom + border


def bicubic_centre(pixels: np.ndarray, size: int, crop: float) -> np.ndarray:
    """The centre of a photo, uint8 [H, W, C] -> [S, S, C], as torchvision's and timm's transforms make it, to
    the pixel: the whole is resized until its short side has S / crop pixels, and the middle is cut out."""
    height, width, _ = pixels.shape
    short = round(size / crop)
    rows, columns = (int(short * side / min(height, width)) for side in (height, width))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    # Pillow reads beyond the box at its edges, as if it resized all.
    box = (
        left * width / columns,
        top * height / rows,
        min(width, (left + size) * width / columns),
        min(height, (top + size) * height / rows),
    )
    return bicubic(pixels, size, box)


def bicubic(
    pixels: np.ndarray, size: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """A part of a photo, or the whole, uint8 [H, W, C] -> [S, S, C]."""
    channels = pixels.shape[2]
    image = Image.fromarray(np.ascontiguousarray(pixels if channels == 3 else pixels[:, :, 0]))
    found = np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return found.reshape(size, size, channels)


def photos_in(folder: Path) -> list[Path]:
    """The photos in a folder and below, by their names, in order."""
    return sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in EXTENSIONS and p.is_file())


def one_by_one(photos: Photo | Iterable[Photo]) -> list[Photo]:
    """The photos of a list, of an array [B, H, W, C] or tensor [B, C, H, W], or the one. ValueError if there
    are none."""
    if isinstance(photos, np.ndarray | Tensor):
        found: list[Photo] = list(photos) if photos.ndim == 4 else [photos]
    elif isinstance(photos, str | os.PathLike | bytes | Image.Image):
        found = [photos]
    elif isinstance(photos, Iterable):
        found = list(photos)
    else:
        raise ValueError(f"{_kind(photos)} is no photo; {_WANTED}")
    if not found:
        raise ValueError("there are no photos: the list is empty")
    return found


_WANTED = (
    "give a path, a PIL image, an array [H, W, C] of numpy or [C, H, W] of torch (1, 3 or 4 channels; uint8, "
    "or floating point in [0, 1]), or a list of them"
)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _image(photo: Photo) -> Image.Image:
    """A photo in memory as a PIL image, upright."""
    if isinstance(photo, Image.Image):
        with pillow_errors(_FORMATS):
            return ImageOps.exif_transpose(photo)
    if isinstance(photo, Tensor):
        tensor = photo.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        pixels = (tensor.movedim(0, -1) if tensor.ndim == 3 else tensor).numpy()
    elif isinstance(photo, np.ndarray):
        pixels = photo
    else:
        raise ValueError(f"{_kind(photo)} is no photo; {_WANTED}")
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)) or not pixels.size:
        raise ValueError(f"{_kind(photo)} of shape {tuple(photo.shape)} is no photo; {_WANTED}")
    pixels = _in_8_bits(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8, as in the files that a model is trained on."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"pixels of type {pixels.dtype} have no known scale; {_WANTED}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(
            f"floating-point pixels must lie in [0, 1], got {low:.4g} to {high:.4g}; give them as they are "
            f"before any normalisation, which is done here"
        )
    return np.round(pixels * 255).astype(np.uint8)
