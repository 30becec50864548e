"""Augmentation: which part of an image is cropped, how tiny images are moved, which slots are blended.

Letters: S image side, C channels, B batch. Randomness comes in as numbers, never from a generator, so that an
image's augmentation depends on (seed, epoch, position) alone. What is cheap on the device (flip,
normalisation, blending) is only decided here and done there.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from megavit.data.config import DataConfig

NUM_RANDOM = 9  # uniforms that one training image consumes
NUM_MIX_RANDOM = 4  # and one pair of slots, for mixup and cutmix
_ASPECT = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def train_box(width: int, height: int, config: DataConfig, u: np.ndarray) -> Box:
    """The part of a training image that is resized to the model's size; `u` are NUM_RANDOM uniforms.

    Inception crop: a random share of the area, aspect 3/4 to 4/3, log-uniform. One draw, clipped to the
    image, instead of the usual rejection loop: the number of random numbers stays fixed.
    """
    if config.augment == "none":
        return eval_box(width, height, config.eval_crop)
    low, high = config.crop_area
    area = (low + (high - low) * u[0]) * width * height
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** u[1]
    w = max(1, min(width, round(math.sqrt(area * aspect))))
    h = max(1, min(height, round(math.sqrt(area / aspect))))
    left, top = int((width - w + 1) * u[2]), int((height - h + 1) * u[3])
    return left, top, left + w, top + h


def eval_box(width: int, height: int, crop: float) -> Box:
    """The central square of `crop` times the short side."""
    side = max(1, round(min(width, height) * crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def affine(pixels: np.ndarray, config: DataConfig, u: np.ndarray) -> None:
    """Rotate, zoom and shift uint8 [S, S, C] about its centre, in place, as the configuration says; black
    border."""
    if not (config.rotate_degrees or config.shift or config.zoom):
        return
    height, width = pixels.shape[:2]
    angle = math.radians(config.rotate_degrees) * (2 * u[4] - 1)
    zoom = 1 + config.zoom * (2 * u[8] - 1)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    cx, cy = width / 2, height / 2
    dx, dy = config.shift * width * (2 * u[5] - 1), config.shift * height * (2 * u[6] - 1)
    matrix = (cos, -sin, cx - cos * cx + sin * cy + dx, sin, cos, cy - sin * cx - cos * cy + dy)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    moved = image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    pixels[:] = np.asarray(moved).reshape(pixels.shape)


def flips(config: DataConfig, u: np.ndarray) -> np.ndarray:
    """bool [B]: which of the images with uniforms `u` [B, NUM_RANDOM] are mirrored."""
    return (u[:, 7] < 0.5) & config.flip


def blends(size: int, config: DataConfig, u: np.ndarray) -> np.ndarray | None:
    """How the two slots of each pair are mixed, float32 [B, 6], or None without mixup and cutmix.

    Columns: share of the own pixels, share of the own label, and the box (top, bottom, left, right) that
    comes from the partner. `u` [B, NUM_MIX_RANDOM] is the same for both slots of a pair, so that each is the
    other's mirror.
    mixup: arXiv 1710.09412, cutmix: 1905.04899.
    """
    if not (config.mixup or config.cutmix):
        return None
    use_cutmix = (u[:, 0] < 0.5) if config.mixup and config.cutmix else np.full(len(u), bool(config.cutmix))
    share = np.where(use_cutmix, _beta(config.cutmix, u[:, 1]), _beta(config.mixup, u[:, 1]))
    side = size * np.sqrt(1 - share)
    edges = []
    for centre in (u[:, 2] * size, u[:, 3] * size):
        edges += [np.clip(np.round(centre + sign * side / 2), 0, size) * use_cutmix for sign in (-1, 1)]
    top, bottom, left, right = edges
    label = np.where(use_cutmix, 1 - (bottom - top) * (right - left) / size**2, share)
    pixels = np.where(use_cutmix, 1.0, share)
    return np.stack([pixels, label, top, bottom, left, right], axis=1).astype(np.float32)


def _beta(alpha: float, u: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) by its inverse distribution function: one uniform a draw, whatever alpha."""
    from scipy.special import betaincinv

    return betaincinv(alpha, alpha, u) if alpha else np.ones_like(u)
