"""Snow, frost, fog and spatter, for `corruptions`: what falls on a picture or on the lens.

A layer is drawn for a picture of 224 pixels and then resized: flakes scale with the picture.

Letters: S image side, C channels (1 or 3).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from megavit.evaluate.corruption_filters import SIDE, filtered, fractal, gaussian, resized, streak

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Mean colour and contrast (standard deviation of the brightness) of five photographs of frosted glass, which
# the authors' code lays over pictures.
_FROSTS = (
    ((0.31, 0.59, 0.65), 0.07),
    ((0.79, 0.81, 0.84), 0.09),
    ((0.79, 0.81, 0.84), 0.09),
    ((0.54, 0.60, 0.65), 0.11),
    ((0.44, 0.48, 0.53), 0.17),
)


class Snow(NamedTuple):
    """density: mean of the noise, whose standard deviation is 0.3. flake: its size. threshold: what is below
    is air. radius and sigma: of its fall. clear: how much of the picture is not whitened."""

    density: float
    flake: float
    threshold: float
    radius: int
    sigma: float
    clear: float


class Spatter(NamedTuple):
    """mean and std: of noise, which is then blurred by `blur`; above the threshold is liquid. strength: of
    the light in water, or how far the edge of mud is softened."""

    mean: float
    std: float
    blur: float
    threshold: float
    strength: float
    mud: bool


def fog(x: np.ndarray, air: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A cloud is added, and the sum scaled back to the picture's brightest value."""
    strength, decay = air
    brightest = x.max()
    cloud = resized(fractal(SIDE, decay, rng), len(x))[:, :, None]
    return (x + strength * cloud) * (brightest / (brightest + strength))


def snow(x: np.ndarray, fall: Snow, rng: np.random.Generator) -> np.ndarray:
    """Streaks of falling flakes, in two directions, over a whitened picture."""
    points = math.ceil(SIDE / fall.flake)
    flakes = cv2.resize(rng.normal(fall.density, 0.3, (points, points)), (SIDE, SIDE))
    flakes[flakes < fall.threshold] = 0
    kernel = streak(fall.radius, fall.sigma, rng.uniform(-135, -45), SIDE)
    layer = resized(filtered(flakes.clip(0, 1).astype(np.float32), kernel), len(x))
    white = np.maximum(x, _grey(x) * 1.5 + 0.5)
    layers = layer + np.rot90(layer, 2)
    return fall.clear * x + (1 - fall.clear) * white + layers[:, :, None]


def frost(x: np.ndarray, mix: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random part of one of five frosted panes, added to the darkened picture."""
    keep, add = mix
    side = len(x)
    pane = _panes(side)[rng.integers(len(_FROSTS))]
    top, left = rng.integers(0, side + 1, 2)
    ice = pane[top : top + side, left : left + side]
    return keep * x + add * (ice if x.shape[2] == 3 else _grey(ice))


@lru_cache(maxsize=2)
def _panes(side: int) -> list[np.ndarray]:
    """Frosted glass, five times float32 [2 side, 2 side, 3]: needles of ice in all directions, thick in some
    places. The same ones always, as the photographs are; a quarter of a second once."""
    rng = np.random.default_rng(2019)
    panes = []
    for colour, contrast in _FROSTS:
        needles = np.zeros((2 * SIDE, 2 * SIDE), np.float32)
        for degrees in rng.uniform(0, 180, 6):
            seeds = (rng.random(needles.shape) < 0.004) * rng.random(needles.shape)
            grown = filtered(seeds.astype(np.float32), streak(12, 10, degrees, SIDE), cv2.BORDER_REFLECT)
            needles = np.maximum(needles, grown)
        ice = needles / needles.std() * (0.3 + fractal(2 * SIDE, 1.5, rng))
        ice += 2 * fractal(2 * SIDE, 1.7, rng)
        ice = (ice - ice.mean()) / ice.std() * contrast
        panes.append(resized(ice[:, :, None] + np.array(colour, np.float32), 2 * side).clip(0, 1))
    return panes


def spatter(x: np.ndarray, drops: Spatter, rng: np.random.Generator) -> np.ndarray:
    """Drops of water, or of mud, on the lens."""
    noise = rng.normal(drops.mean, drops.std, (SIDE, SIDE)).astype(np.float32)
    liquid = gaussian(noise, drops.blur)
    if drops.mud:
        layer = gaussian((liquid > drops.threshold).astype(np.float32), drops.strength)
        colour = np.array([63, 42, 20], np.float32) / 255
        layer[layer < 0.8] = 0
    else:
        liquid[liquid < drops.threshold] = 0
        layer = _relief((liquid.clip(0, 1) * 255).astype(np.uint8))
        layer *= drops.strength / max(float(layer.max()), 1e-6)
        colour = np.array([175, 238, 238], np.float32) / 255
    layer = resized(layer, len(x))[:, :, None]
    tint = colour if x.shape[2] == 3 else colour @ _LUMA
    return (x * (1 - layer) if drops.mud else x) + layer * tint


def _relief(liquid: np.ndarray) -> np.ndarray:
    """The light in drops, uint8 [S, S] -> float32 [S, S]: an embossed map of the distance to their edges."""
    edges = cv2.Canny(liquid, 50, 150)
    distance = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    even = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    light = cv2.blur(cv2.filter2D(even, cv2.CV_8U, emboss), (3, 3))
    return liquid.astype(np.float32) * light


def _grey(x: np.ndarray) -> np.ndarray:
    """[S, S, C] -> [S, S, 1]."""
    return x if x.shape[2] == 1 else (x @ _LUMA)[:, :, None]
