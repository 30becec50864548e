"""From encoded bytes to a uint8 image of the model's size, and from uint8 to the model's input.

Letters: S image side, C channels. Randomness comes in as numbers, never from a generator, so that an image's
augmentation depends on (seed, epoch, position) alone.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavit.config import DataConfig

NUM_RANDOM = 9  # uniforms that one training image consumes
_ASPECT = (3 / 4, 4 / 3)


def decode(data: bytes, channels: int) -> Image.Image:
    """JPEG, PNG or WebP bytes -> PIL image, grey (channels 1) or RGB (3). Raises OSError for undecodable
    bytes."""
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def train_transform(image: Image.Image, size: int, config: DataConfig, u: np.ndarray) -> np.ndarray:
    """Augmented uint8 [S, S, C]; `u` are NUM_RANDOM uniforms in [0, 1)."""
    if config.augment == "none":
        image = _center(image, size, config.eval_crop)
    else:
        image = image.resize(
            (size, size), Image.Resampling.BILINEAR, box=_inception_box(image.size, config.crop_area, u)
        )
    if config.rotate_degrees or config.shift or config.zoom:
        image = _affine(image, config, u)
    pixels = _pixels(image)
    return np.ascontiguousarray(pixels[:, ::-1]) if config.flip and u[7] < 0.5 else pixels


def eval_transform(image: Image.Image, size: int, config: DataConfig) -> np.ndarray:
    """Short side to size / eval_crop, centre crop: uint8 [S, S, C]."""
    return _pixels(_center(image, size, config.eval_crop))


def to_model_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, S, S, C] on the host -> float32 [B, C, S, S] in [-1, 1] on `device`, as the paper's family is
    trained."""
    images = images.to(device, non_blocking=True)
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _center(image: Image.Image, size: int, crop: float) -> Image.Image:
    """The central square of `crop` times the short side, resized in one go."""
    width, height = image.size
    side = min(width, height) * crop
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _inception_box(
    size: tuple[int, int], area: tuple[float, float], u: np.ndarray
) -> tuple[float, float, float, float]:
    """Random box (left, top, right, bottom) of a share of the area and an aspect of 3/4 to 4/3, log-uniform.

    One draw, clipped to the image, instead of the usual rejection loop: the number of random numbers stays
    fixed.
    """
    width, height = size
    share = area[0] + (area[1] - area[0]) * u[0]
    aspect = math.exp(math.log(_ASPECT[0]) + (math.log(_ASPECT[1]) - math.log(_ASPECT[0])) * u[1])
    w = min(width, math.sqrt(width * height * share * aspect))
    h = min(height, math.sqrt(width * height * share / aspect))
    left, top = (width - w) * u[2], (height - h) * u[3]
    return left, top, left + w, top + h


def _affine(image: Image.Image, config: DataConfig, u: np.ndarray) -> Image.Image:
    """Rotation, zoom and shift about the centre; the border is filled with black."""
    width, height = image.size
    angle = math.radians(config.rotate_degrees) * (2 * u[4] - 1)
    zoom = 1 + config.zoom * (2 * u[8] - 1)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    cx, cy = width / 2, height / 2
    dx, dy = config.shift * width * (2 * u[5] - 1), config.shift * height * (2 * u[6] - 1)
    matrix = (cos, -sin, cx - cos * cx + sin * cy + dx, sin, cos, cy - sin * cx - cos * cy + dy)
    return image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
