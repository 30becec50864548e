"""The corruptions of ImageNet-C, made on the fly for any set of pictures.

Source of the method and of all constants: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations" (2019, arXiv 1903.12261), and ImageNet-C/create_c/make_imagenet_c.py
of github.com/hendrycks/robustness. They were chosen for pictures of 224 pixels. Here every length (radius of
a blur, path of a movement, displacement, size of flakes) is multiplied by S / 224, so that a small picture
keeps its content; noise is drawn for each pixel at any size, and pixelate keeps its ratio.

What differs from the published images, so that scores on them and on these are not to be mixed:
    they were saved as JPEG of quality 85; these are not compressed, and rounded to the nearest grey level;
    frost lays photographs of frosted glass over the picture, which do not come with this package: here
    needles of ice are drawn with the colours and contrasts of those photographs;
    motion_blur and snow move by ImageMagick there, to the nearest pixel; here between pixels;
    zoom_blur zooms to the exact factor, not to a whole number of pixels.

Letters: S image side, C channels (1 or 3). Functions take float32 [S, S, C] in [0, 1].
"""

from __future__ import annotations

import difflib
import io
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from megavit.evaluate import corruption_weather as weather
from megavit.evaluate.corruption_filters import (
    SIDE,
    disk,
    displacement,
    filtered,
    gaussian,
    streak,
)


def corrupt(pixels: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """A corrupted copy of a picture, uint8 [S, S, C].

    Args:
        pixels: uint8 [S, S, C], C 1 or 3; it is not written to.
        name: one of CORRUPTIONS, by which mCE is defined, or of EXTRA.
        severity: 1 (weak) to 5.
        seed: which noise; the picture's number in its set. The same arguments give the same picture, whatever
            else was drawn. The severities of a picture share their draws, so that a curve over them shows the
            severity and not the luck.

    ValueError for an unknown name or severity. Cost for 224 x 224 x 3: glass_blur 11 ms of a core, shot_noise
    7, the others 0.4 to 4.
    """
    check_corruption(name, severity)
    side, _, channels = pixels.shape
    assert pixels.dtype == np.uint8 and pixels.shape == (side, side, channels) and channels in (1, 3)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    made = _MADE[name](pixels.astype(np.float32) / 255, _SEVERITIES[name][severity - 1], rng)
    return np.rint(made.clip(0, 1) * 255).astype(np.uint8)


def check_corruption(name: str, severity: int) -> None:
    """ValueError unless there is such a corruption."""
    if name not in _MADE:
        near = difflib.get_close_matches(name, _MADE, 3, 0.4) or _MADE
        raise ValueError(f"there is no corruption {name!r}; there are {', '.join(near)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")


def _gaussian_noise(x: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return x + std * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """`photons` of them make white."""
    return rng.poisson(x * photons).astype(np.float32) / photons


def _impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the values is replaced by 0 or 1."""
    draw = rng.random(x.shape, np.float32)
    return np.where(draw < share, (draw < share / 2).astype(np.float32), x)


def _speckle_noise(x: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * std * rng.standard_normal(x.shape, np.float32)


def _gaussian_blur(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return gaussian(x, sigma)


def _defocus_blur(x: np.ndarray, lens: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    return filtered(x, disk(*lens, side=len(x)), cv2.BORDER_REFLECT_101)


def _glass_blur(x: np.ndarray, glass: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """Blurred, each pixel replaced by a random one nearby, several times, and blurred again.

    The pixels are visited one after the other, from the last: one that takes its colour from below has that
    of a pixel further away. That is what the authors' code does, which means to swap them.
    """
    sigma, reach_at_224, rounds = glass
    side = len(x)
    blurred = gaussian(x, sigma)
    # Where the reach is a part of a pixel, that part of the pixels takes part.
    reach = max(1, round(reach_at_224 * side / SIDE))
    share = min(1.0, reach_at_224 * side / SIDE / reach)
    inner = np.arange(side - reach, reach, -1) if side > 2 * reach else np.arange(0)
    at = (inner[:, None] * side + inner).ravel()
    source = list(range(side * side))
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(at)))
        chosen = rng.random(len(at)) < share
        takes = (at + down * side + right)[chosen]
        for pixel, other in zip(at[chosen].tolist(), takes.tolist(), strict=True):
            source[pixel] = source[other]
    return gaussian(blurred.reshape(side * side, -1)[source].reshape(x.shape), sigma)


def _motion_blur(x: np.ndarray, move: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    return filtered(x, streak(*move, degrees=rng.uniform(-45, 45), side=len(x)))


def _zoom_blur(x: np.ndarray, zoom: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """The mean over zooms from 1 on, in steps; the picture itself counts twice."""
    end, step = zoom
    factors = np.arange(1, end, step)
    total = x.copy()
    centre = (len(x) - 1) / 2
    for factor in factors:
        inverse = np.array(
            [[1 / factor, 0, centre - centre / factor], [0, 1 / factor, centre - centre / factor]]
        )
        zoomed = cv2.warpAffine(x, inverse, x.shape[:2], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        total += zoomed.reshape(x.shape)
    return total / (len(factors) + 1)


def _brightness(x: np.ndarray, more: float, rng: np.random.Generator) -> np.ndarray:
    """HSV's V, which is the largest channel, grows; hue and saturation stay."""
    value = x.max(2, keepdims=True)
    grown = np.minimum(value + more, 1)
    return np.where(value > 0, x * grown / np.maximum(value, 1e-6), grown)


def _contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1), np.float64, keepdims=True)
    return (x - mean) * factor + mean


def _saturate(x: np.ndarray, change: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """HSV's S is multiplied and increased. A grey picture (C = 1) has no hue and stays as it is."""
    if x.shape[2] == 1:
        return x
    factor, more = change
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[:, :, 1] = np.clip(hsv[:, :, 1] * factor + more, 0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _elastic_transform(
    x: np.ndarray, bend: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Three points around the middle are displaced by up to `shift`, and every pixel by a smooth field. The
    first two severities displace the points ten times as far as the others: the order of their damage is not
    that of their numbers."""
    strength, sigma, shift = bend
    side = len(x)
    scale = side / SIDE
    corners = (np.array([[1, 1], [1, -1], [-1, -1]]) * 74 + SIDE / 2) * scale
    moved = corners + rng.uniform(-shift, shift, (3, 2)) * scale
    affine = cv2.getAffineTransform(corners.astype(np.float32), moved.astype(np.float32))
    x = cv2.warpAffine(x, affine, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    columns, rows = (
        places.astype(np.float32) + strength * scale * displacement(side, sigma, rng)
        for places in np.meshgrid(np.arange(side), np.arange(side))
    )
    return cv2.remap(x, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT).reshape(
        side, side, -1
    )


def _pixelate(x: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    image, side = _to_pillow(x), len(x)
    small = max(1, int(side * ratio))
    image = image.resize((small, small), Image.Resampling.BOX)
    return _from_pillow(image.resize((side, side), Image.Resampling.BOX))


def _jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _to_pillow(x).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return _from_pillow(image)


def _to_pillow(x: np.ndarray) -> Image.Image:
    pixels = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _from_pillow(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float32) / 255
    return pixels.reshape(*pixels.shape[:2], -1)


_Made = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
# In the order of the paper's tables.
_MADE: dict[str, _Made] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": weather.spatter,
    "saturate": _saturate,
}
CORRUPTIONS = tuple(_MADE)[:15]
EXTRA = tuple(_MADE)[15:]

# What each function's second argument is, at severity 1 to 5; lengths in pixels of 224.
_SEVERITIES: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        weather.Snow(0.1, 3, 0.5, 10, 4, 0.8),
        weather.Snow(0.2, 2, 0.5, 12, 4, 0.7),
        weather.Snow(0.55, 4, 0.9, 12, 8, 0.7),
        weather.Snow(0.55, 4.5, 0.85, 12, 8, 0.65),
        weather.Snow(0.55, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    # The authors' 244 where 224 was meant is in these numbers.
    "elastic_transform": (
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "spatter": (
        weather.Spatter(0.65, 0.3, 4, 0.69, 0.6, mud=False),
        weather.Spatter(0.65, 0.3, 3, 0.68, 0.6, mud=False),
        weather.Spatter(0.65, 0.3, 2, 0.68, 0.5, mud=False),
        weather.Spatter(0.65, 0.3, 1, 0.65, 1.5, mud=True),
        weather.Spatter(0.67, 0.4, 1, 0.65, 1.5, mud=True),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
