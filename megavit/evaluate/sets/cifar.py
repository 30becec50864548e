"""CIFAR-10 and -100 from the folders of their "python version"."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megavit.data.write import cifar_arrays, cifar_class_names, cifar_files
from megavit.evaluate.sets.image_set import ImageSet, Pixels, one_label
from megavit.evaluate.sets.origin import Origin


def _origin(num_classes: int, layout: str) -> Origin:
    return Origin(
        title=f"CIFAR-{num_classes}",
        layout=layout,
        source="https://www.cs.toronto.edu/~kriz/cifar.html (the python version, extracted)",
        terms="no licence is stated",
        size="about 0.2 GB",
        images={"train": 50_000, "test": 10_000},
    )


ORIGIN_10 = _origin(10, "cifar-10-batches-py/{data_batch_1,...,data_batch_5,test_batch,batches.meta}")
ORIGIN_100 = _origin(100, "cifar-100-python/{train,test,meta}")


def cifar10(root: str | Path, split: Literal["train", "test"] = "test") -> ImageSet:
    """CIFAR-10 (Krizhevsky, 2009): 32x32 images. MissingData, or ValueError for a damaged file."""
    return _cifar(ORIGIN_10, root, "cifar-10-batches-py", "batches.meta", 10, split)


def cifar100(root: str | Path, split: Literal["train", "test"] = "test") -> ImageSet:
    """CIFAR-100 with its 100 fine classes. MissingData, or ValueError for a damaged file."""
    return _cifar(ORIGIN_100, root, "cifar-100-python", "meta", 100, split)


def _cifar(
    origin: Origin,
    root: str | Path,
    folder_name: str,
    meta: str,
    num_classes: int,
    split: Literal["train", "test"],
) -> ImageSet:
    folder = origin.folder(root, folder_name)
    for name in (meta, *cifar_files(num_classes, split)):
        origin.file(folder / name)
    arrays = cifar_arrays(folder, num_classes, split)
    names = tuple(cifar_class_names(folder, num_classes))
    if len(names) != num_classes:
        raise ValueError(f"{folder / meta} has the names of {len(names)} classes, not of {num_classes}")
    pixels = Pixels(f"{folder_name}/{split}", arrays.images)
    space = f"cifar{num_classes}"
    return ImageSet(space, split, pixels, one_label(arrays.labels), names, space, pixels.digest())
