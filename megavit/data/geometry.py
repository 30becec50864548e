"""A sample's geometry: which part of its picture is cropped, how the crop is moved, whether it is mirrored.

It is decided once, from the picture's size and the sample's uniforms, and applied to every field: pictures
are interpolated, planes (masks, depth) take the nearest pixel. Values of planes stay as they are: what is
shown larger has not come nearer, and its depth in metres is still the one that was measured. Randomness comes
in as numbers, never from a generator, so that a sample's geometry depends on (seed, epoch, position) alone.

Letters: S side of a square field, C channels, H and W the stored sides, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megavit.data.config import DataConfig
from megavit.data.exif import Box

NUM_RANDOM = 10  # uniforms that one training sample consumes
_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Affine:
    """A rotation, zoom and shift of a square about its centre, whatever its side.

    `cos` and `sin` are those of the angle times the zoom; the shift is `shift` times the side, times `x` and
    `y` in [-1, 1].
    """

    cos: float
    sin: float
    shift: float
    x: float
    y: float

    def matrix(self, size: int) -> tuple[float, float, float, float, float, float]:
        """(a, b, c, d, e, f): the pixel at (x, y) shows what was at (ax + by + c, dx + ey + f)."""
        cos, sin, middle = self.cos, self.sin, size / 2
        dx, dy = self.shift * size * self.x, self.shift * size * self.y
        return (
            cos,
            -sin,
            middle - cos * middle + sin * middle + dx,
            sin,
            cos,
            middle - sin * middle - cos * middle + dy,
        )


@dataclass(frozen=True)
class Geometry:
    """How the fields of one sample are cut to squares.

    Args:
        width, height: the picture's size, upright. Every field that has pixels must have the same.
        box: the part that is resized to S x S.
        place: where in the square it lies, as shares (left, top, right, bottom) of the side; the rest is
            filled. None: everywhere.
        affine: how that square is moved then; what comes from outside of it is filled.
        mirror: whether the device mirrors the square left to right. A field that is no square of pixels, such
            as a list of points, must do so itself.
        time: where a clip of a video begins, of the time that there is for it; None in evaluation.
    """

    width: int
    height: int
    box: Box
    affine: Affine | None = None
    mirror: bool = False
    time: float | None = None
    place: tuple[float, float, float, float] | None = None

    def at(self, width: int, height: int, member: str) -> Geometry:
        """Itself, for a member of the same size as the picture; ValueError naming both for another."""
        if (width, height) != (self.width, self.height):
            raise ValueError(
                f"its {member} has {width}x{height} pixels, but its picture {self.width}x{self.height}"
            )
        return self

    def box_in(self, size: int) -> Box:
        """Where in a square of side `size` the picture's box lies, in pixels, at least one."""
        if self.place is None:
            return 0, 0, size, size
        left, top = (min(size - 1, round(share * size)) for share in self.place[:2])
        right, bottom = (round(share * size) for share in self.place[2:])
        return left, top, max(left + 1, right), max(top + 1, bottom)

    def move(self, pixels: np.ndarray, fill: float = 0.0) -> None:
        """Apply the affine map to a picture [S, S, C], uint8 with 1 or 3 channels or float32 with any number,
        in place and bilinear; what comes from outside is `fill`."""
        if self.affine is None:
            return
        matrix = self.affine.matrix(len(pixels))
        whole = pixels.dtype == np.uint8 and pixels.shape[2] == 3
        for part in [pixels] if whole else np.moveaxis(pixels, 2, 0):
            image = Image.fromarray(part)
            moved = image.transform(
                image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill or None
            )
            part[:] = np.asarray(moved)

    def nearest(self, plane: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The pixels [S, S, ...] of a plane [H, W, ...] that are nearest to the centres of the output's
        pixels, in one step, and a mask bool [S, S] of those that come from outside of the square, whose
        values mean nothing; None if there are none."""
        left, top, right, bottom = self.box
        x0, y0, x1, y1 = self.box_in(size)
        row_step, column_step = (bottom - top) / (y1 - y0), (right - left) / (x1 - x0)
        x: np.ndarray = np.arange(size) + 0.5  # [S], [S, S] under an affine map
        y = x[:, None]
        if self.affine is None:
            rows = _inside((x - y0) * row_step, top, bottom)
            columns = _inside((x - x0) * column_step, left, right)
            found = plane[rows][:, columns]
        else:
            a, b, c, d, e, f = self.affine.matrix(size)
            x, y = a * x + b * y + c, d * x + e * y + f
            found = plane[
                _inside((y - y0) * row_step, top, bottom), _inside((x - x0) * column_step, left, right)
            ]
        if self.affine is None and self.place is None:
            return found, None
        return found, (x < x0) | (x >= x1) | (y < y0) | (y >= y1)


def decide(width: int, height: int, config: DataConfig, u: np.ndarray | None) -> Geometry:
    """The geometry of a sample whose picture has this size: for training by the uniforms `u` [NUM_RANDOM],
    or, if None, that of the evaluation."""
    if u is None:
        return Geometry(width, height, eval_box(width, height, config.eval_crop))
    box, place = train_box(width, height, config, u), None
    if config.augment == "scale":
        box, place = _cut(box, width, height)
    mirror = bool(config.flip and u[7] < 0.5)
    return Geometry(width, height, box, _affine(config, u), mirror, float(u[9]), place)


def train_box(width: int, height: int, config: DataConfig, u: np.ndarray) -> Box:
    """The part of a training image that is resized to the model's size; `u` are NUM_RANDOM uniforms.

    Inception crop: a random share of the area, aspect 3/4 to 4/3, log-uniform. One draw, clipped to the
    image, instead of the usual rejection loop: the number of random numbers stays fixed.

    Scale: a random square whose side is the image's short side by a uniform factor. It reaches beyond the
    image where that is the smaller one, which then lies at a random place of it.
    """
    if config.augment == "none":
        return eval_box(width, height, config.eval_crop)
    if config.augment == "scale":
        low, high = config.scale_range
        side = max(1, round(min(width, height) / (low + (high - low) * u[0])))
        left, top = _start(width - side, u[2]), _start(height - side, u[3])
        return left, top, left + side, top + side
    low, high = config.crop_area
    area = (low + (high - low) * u[0]) * width * height
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** u[1]
    w = max(1, min(width, round(math.sqrt(area * aspect))))
    h = max(1, min(height, round(math.sqrt(area / aspect))))
    left, top = int((width - w + 1) * u[2]), int((height - h + 1) * u[3])
    return left, top, left + w, top + h


def _start(room: int, u: float) -> int:
    """Where a crop begins for which there is so much room, or, below 0, which is so much too large."""
    return math.floor((room + 1) * u) if room >= 0 else -math.floor((1 - room) * u)


def _cut(box: Box, width: int, height: int) -> tuple[Box, tuple[float, float, float, float] | None]:
    """The part of a square that lies in the picture, and where in the square that is, if it is not all."""
    left, top, right, bottom = box
    inside = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    if inside == box:
        return box, None
    x0, y0, x1, y1 = inside
    side = right - left
    return inside, ((x0 - left) / side, (y0 - top) / side, (x1 - left) / side, (y1 - top) / side)


def eval_box(width: int, height: int, crop: float) -> Box:
    """The central square of `crop` times the short side."""
    side = max(1, round(min(width, height) * crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def flips(config: DataConfig, u: np.ndarray) -> np.ndarray:
    """bool [...]: which of the samples with uniforms `u` [..., NUM_RANDOM] are mirrored."""
    return (u[..., 7] < 0.5) & config.flip


def _affine(config: DataConfig, u: np.ndarray) -> Affine | None:
    if not (config.rotate_degrees or config.shift or config.zoom):
        return None
    angle = math.radians(config.rotate_degrees) * (2 * u[4] - 1)
    zoom = 1 + config.zoom * (2 * u[8] - 1)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    return Affine(cos, sin, config.shift, 2 * u[5] - 1, 2 * u[6] - 1)


def _inside(distance: np.ndarray, start: int, end: int) -> np.ndarray:
    """Indexes at a distance from `start`; those before it or from `end` on become the first or last."""
    return np.clip(np.floor(distance).astype(np.intp) + start, start, end - 1)
