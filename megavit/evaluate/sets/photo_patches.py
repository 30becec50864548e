"""Patches of the two photos that scikit-learn comes with: images that no classifier of digits should know."""

from __future__ import annotations

import numpy as np

from megavit.evaluate.sets.image_set import ImageSet, Pixels, one_label

PHOTO_PATCHES = "sklearn-photos"
_SIDE = 32


def photo_patches() -> ImageSet:
    """520 patches of 32x32 pixels in colour; class 0 is china.jpg, class 1 flower.jpg."""
    from sklearn.datasets import load_sample_images

    patches, labels = [], []
    for number, photo in enumerate(load_sample_images().images):
        rows, columns = photo.shape[0] // _SIDE, photo.shape[1] // _SIDE
        whole = photo[: rows * _SIDE, : columns * _SIDE]
        cut = whole.reshape(rows, _SIDE, columns, _SIDE, 3).swapaxes(1, 2)
        patches.append(cut.reshape(-1, _SIDE, _SIDE, 3))
        labels += [number] * (rows * columns)
    pixels = Pixels(PHOTO_PATCHES, np.concatenate(patches))
    names = ("china", "flower")
    return ImageSet(PHOTO_PATCHES, "test", pixels, one_label(labels), names, PHOTO_PATCHES, pixels.digest())
