"""Small real data sets with a plane beside each picture, out of packages that are installed: depth in a photo
(scikit-image's motorcycle, of the Middlebury stereo benchmark) and mosaics of handwritten digits with masks
(scikit-learn's). Nothing is downloaded.

Letters: H and W the sides of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from megavit.data.plane_facts import PlaneFacts
from megavit.data.write import DataSet, Split, digest, digits_arrays
from megavit.data.write_pairs import encode_png

# Calibration of the photo as scikit-image ships it, from the docstring of `skimage.data.stereo_motorcycle`.
# A pixel of disparity d is FOCAL * BASELINE / (d + OFFSET) away.
_FOCAL_PX, _BASELINE_M, _OFFSET_PX = 994.978, 0.193001, 31.086
_TRAINED = 0.7  # of the photo's width, from the left
_STRIDE = 3  # columns between strips of training
_SIDE = 128  # of the squares that strips are squeezed to

BACKGROUND = 10  # the class beside the ten digits
_INK = 96  # of 255: a pixel of the digit
_NUM_MOSAICS = 200


@dataclass(frozen=True)
class Arrays:
    """Pictures uint8 [n][H, W] or [n][H, W, 3] with planes [n][H, W] called `name`, stored as PNG."""

    name: str
    pictures: Sequence[np.ndarray]
    planes: Sequence[np.ndarray]

    def __call__(self, i: int) -> dict[str, bytes]:
        return {"png": encode_png(self.pictures[i]), f"{self.name}.png": encode_png(self.planes[i])}

    def split(self, name: str) -> Split:
        content = [part[i].tobytes() for part in (self.pictures, self.planes) for i in range(len(part))]
        return Split(name, len(self.pictures), self, digest(content))


# Depth


def motorcycle() -> tuple[np.ndarray, np.ndarray]:
    """The left photo, uint8 [500, 741, 3], and its depth in millimetres, uint16 [500, 741], 0 where it is not
    known (7% of the pixels). ValueError without scikit-image."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise ValueError("motorcycle needs scikit-image: pip install 'megavit[demo]'") from error
    photo, _, disparity = stereo_motorcycle()
    known = np.isfinite(disparity)
    metres = _FOCAL_PX * _BASELINE_M / (np.where(known, disparity, 0) + _OFFSET_PX)
    return photo, np.where(known, np.round(metres * 1000), 0).astype(np.uint16)


def motorcycle_set() -> DataSet:
    """Upright strips of the photo, squeezed to squares: for training overlapping ones from the left 70%, and
    for test the rest, of the same width. A strip is as high as the photo, as how far the floor is can only be
    told from where it is."""
    photo, depth = motorcycle()
    middle = round(depth.shape[1] * _TRAINED)
    width = depth.shape[1] - middle
    train = _strips(photo, depth, range(0, middle - width + 1, _STRIDE), width)
    test = _strips(photo, depth, [middle], width)
    trained = _strips(photo, depth, [0], middle).planes[0]
    return DataSet(
        [train.split("train"), test.split("test")],
        planes={"depth": PlaneFacts(scale=0.001, invalid=0, max_m=6)},
        baselines=lambda: _depth_baselines(trained, test.planes[0]),
    )


def _strips(photo: np.ndarray, depth: np.ndarray, lefts: Iterable[int], width: int) -> Arrays:
    """The columns from `lefts` on, pictures averaged and depth of the nearest pixel."""
    rows = _centres(depth.shape[0])
    pictures, planes = [], []
    for left in lefts:
        strip = Image.fromarray(photo[:, left : left + width])
        pictures.append(np.asarray(strip.resize((_SIDE, _SIDE), Image.Resampling.BOX)))
        planes.append(depth[rows][:, left + _centres(width)])
    return Arrays("depth", pictures, planes)


def _centres(side: int) -> np.ndarray:
    """The pixels, of `side`, in which the centres of `_SIDE` equal parts are."""
    return ((np.arange(_SIDE) + 0.5) * side / _SIDE).astype(np.int64)


def _depth_baselines(trained: np.ndarray, tested: np.ndarray) -> dict[str, Any]:
    """Mean relative errors without looking at the picture: the median of all training pixels everywhere, and
    for each row that of its training pixels."""
    guesses = {
        "median": np.median(trained[trained > 0]),
        "median of each row": np.array([np.median(row[row > 0]) for row in trained])[:, None],
    }
    known = tested > 0
    results = {}
    for name, guess in guesses.items():
        guess = np.broadcast_to(guess, tested.shape)
        results[name] = float(np.abs(guess[known] / tested[known] - 1).mean())
    return {"split": "test", "metric": "abs_rel", "higher_is_better": False, "results": results}


# Segmentation


def mosaics_set() -> DataSet:
    """Digits of 8 x 8 pixels, grey, with masks: their classes, and 10 where there is no ink. The splits train
    and test are the demo's; mosaics are 2 x 2 digits of test, for a model of single ones to be moved over."""
    splits = {}
    for name, found in zip(("train", "test"), digits_arrays(), strict=True):
        masks = np.where(found.images >= _INK, found.labels[:, None, None], BACKGROUND).astype(np.uint8)
        splits[name] = Arrays("mask", list(found.images), list(masks))
    test = splits["test"]
    chosen = np.random.default_rng(1).integers(0, len(test.pictures), (_NUM_MOSAICS, 4))
    splits["mosaics"] = Arrays(
        "mask", *(list(_joined(np.stack(part)[chosen])) for part in (test.pictures, test.planes))
    )
    return DataSet(
        [part.split(name) for name, part in splits.items()],
        [*map(str, range(10)), "background"],
        planes={"mask": PlaneFacts(invalid=255, classes=BACKGROUND + 1)},
        baselines=lambda: _mask_baselines(np.stack(test.planes)),
    )


def _joined(tiles: np.ndarray) -> np.ndarray:
    """Squares [n, 4, S, S] as mosaics [n, 2S, 2S], row by row."""
    count, _, side, _ = tiles.shape
    rows = tiles.reshape(count, 2, 2, side, side).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(rows.reshape(count, 2 * side, 2 * side))


def _mask_baselines(masks: np.ndarray) -> dict[str, Any]:
    """Mean IoU without looking at the picture: background everywhere, and any class with equal chances."""
    anything = np.random.default_rng(0).integers(0, BACKGROUND + 1, masks.shape)
    guesses = {"background": np.full_like(masks, BACKGROUND), "any class": anything}
    results = {name: _mean_iou(guess, masks) for name, guess in guesses.items()}
    return {"split": "test", "metric": "miou", "results": results}


def _mean_iou(guess: np.ndarray, masks: np.ndarray) -> float:
    ious = []
    for number in range(BACKGROUND + 1):
        mine, true = guess == number, masks == number
        ious.append((mine & true).sum() / max(1, (mine | true).sum()))
    return float(np.mean(ious))
