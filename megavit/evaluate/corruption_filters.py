"""Blurs, noise fields and displacements whose lengths are given for pictures of 224 pixels a side.

Letters: S image side, C channels, K and L sides of a kernel at 224 pixels and at S.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

SIDE = 224  # the lengths are for pictures of so many pixels a side

# The parallelism of whoever reads images is its processes, see megavit.data.decode.
cv2.setNumThreads(0)


def filtered(image: np.ndarray, kernel: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """float32 [S, S, C] correlated with a kernel [L, L] whose centre is its middle."""
    out = cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=border)
    return out.reshape(image.shape)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A layer [n, n] or [n, n, C] at another side: averaged when it shrinks, bilinear when it grows."""
    return cv2.resize(
        image, (side, side), interpolation=cv2.INTER_AREA if side < len(image) else cv2.INTER_LINEAR
    )


def gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """float32 [S, S, C] blurred; sigma is in pixels of a picture of 224."""
    offsets = np.arange(-round(4 * sigma), round(4 * sigma) + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    line = _spread(len(kernel), image.shape[0] / SIDE) @ (kernel / kernel.sum())
    return cv2.sepFilter2D(image, -1, line, line, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)


def disk(radius: int, sigma: float, side: int) -> np.ndarray:
    """The kernel of a lens out of focus, [L, L] at `side` pixels: a disk, its edge softened by sigma."""
    half = max(radius, 8)
    squares = np.arange(-half, half + 1) ** 2
    kernel = (squares[:, None] + squares <= radius**2).astype(np.float32)
    window = (3, 3) if radius <= 8 else (5, 5)
    spread = _spread(len(kernel), side / SIDE)
    return spread @ cv2.GaussianBlur(kernel / kernel.sum(), window, sigmaX=sigma) @ spread.T


def streak(radius: int, sigma: float, degrees: float, side: int) -> np.ndarray:
    """The kernel of a movement, [L, L] at `side` pixels: half a Gaussian along a line from the centre, up to
    2 radius away."""
    scale = side / SIDE
    along = np.arange(0, 2 * radius + 1, 1 / math.ceil(scale))
    weights = np.exp(-(along**2) / (2 * sigma**2))
    angle = math.radians(degrees)
    half = math.ceil(2 * radius * scale) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1))
    rows, columns = along * scale * math.sin(angle) + half, along * scale * math.cos(angle) + half
    for down in (0, 1):
        for right in (0, 1):
            row, column = np.floor(rows).astype(int) + down, np.floor(columns).astype(int) + right
            shares = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column))
            np.add.at(kernel, (row, column), weights * shares)
    return kernel / kernel.sum()


def fractal(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud in [0, 1], float32 [side, side], by the diamond-square algorithm: from one point on, each step
    halves the distance between points and divides the noise by decay^2."""
    grid, noise = np.zeros((1, 1)), 1.0
    while len(grid) < side:
        fine = np.empty((2 * len(grid), 2 * len(grid)))
        fine[::2, ::2] = grid
        pairs = grid + np.roll(grid, -1, 0)
        centre = (pairs + np.roll(pairs, -1, 1)) / 4 + noise * rng.uniform(-1, 1, grid.shape)
        fine[1::2, 1::2] = centre
        beside = grid + np.roll(grid, -1, 1) + centre + np.roll(centre, 1, 0)
        below = grid + np.roll(grid, -1, 0) + centre + np.roll(centre, 1, 1)
        fine[::2, 1::2] = beside / 4 + noise * rng.uniform(-1, 1, grid.shape)
        fine[1::2, ::2] = below / 4 + noise * rng.uniform(-1, 1, grid.shape)
        grid, noise = fine, noise / decay**2
    low, high = grid.min(), grid.max()
    return ((grid - low) / max(high - low, 1e-12))[:side, :side].astype(np.float32)


def displacement(side: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field, float32 [side, side]: uniform noise in [-1, 1] on 224 x 224 points, smoothed."""
    smooth = _smoother(sigma)
    return resized(smooth @ rng.uniform(-1, 1, (SIDE, SIDE)).astype(np.float32) @ smooth.T, side)


@lru_cache(maxsize=8)
def _smoother(sigma: float) -> np.ndarray:
    """[224, 224]: a Gaussian as a matrix, mirrored at the borders. With a sigma that is most of the picture,
    two products cost a hundredth of the convolution."""
    from scipy.ndimage import gaussian_filter1d

    eye = np.eye(SIDE, dtype=np.float32)
    return gaussian_filter1d(eye, sigma, axis=0, mode="reflect", truncate=3)


def _spread(length: int, scale: float) -> np.ndarray:
    """float64 [L, K] that turns a kernel of K points into one whose lengths are `scale` times as long.

    A point that falls between two pixels is shared by them, as the picture's own bilinear interpolation has
    it: so a blur of a fifth of a pixel is not lost. Where pixels are finer than points, a point is a line of
    several. The identity at scale 1.
    """
    half, parts = length // 2, math.ceil(scale)
    inner = (np.arange(parts) + 0.5) / parts - 0.5
    places = scale * (np.arange(-half, half + 1)[:, None] + inner)  # [K, parts]
    reach = math.ceil(scale * (half + inner[-1]))
    pixels = np.arange(-reach, reach + 1)[:, None, None]
    return np.clip(1 - np.abs(pixels - places), 0, None).mean(2)
