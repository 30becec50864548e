"""The 1000 classes of ILSVRC 2012, by WordNet id, and what other sets have of them.

The class ids of the label space "imagenet" are the places of the sorted WordNet ids, as nearly all public
models have them. `imagenet_classes.txt` holds facts: the ids, names and members of ImageNet-A and -R as timm
1.0.31 lists them, and the 16 categories of model-vs-human's cue-conflict images (Geirhos et al., 2019).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megavit.evaluate.sets.image_set import digest_of

IMAGENET = "imagenet"  # the label space
NUM_CLASSES = 1000


class ImageNetClass(NamedTuple):
    """One line of the table. `also_in` has the letter of each set with this class; `category` may be ""."""

    wnid: str
    name: str
    also_in: str
    category: str


@functools.cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The classes in the order of their ids."""
    text = (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    classes = tuple(ImageNetClass(*row, *[""] * (4 - len(row))) for row in rows)
    assert len(classes) == NUM_CLASSES, len(classes)
    return classes


@functools.cache
def class_of_wnid() -> dict[str, int]:
    """Class id by WordNet id."""
    return {known.wnid: number for number, known in enumerate(imagenet_classes())}


def imagenet_names() -> tuple[str, ...]:
    """Different for each class: where two have the same first name, with a word in brackets."""
    return tuple(known.name for known in imagenet_classes())


def classes_also_in(letter: str) -> np.ndarray:
    """The classes of ImageNet-A ("a") or -R ("r"): int64 [200], ascending."""
    return np.array([n for n, known in enumerate(imagenet_classes()) if letter in known.also_in], np.int64)


def space_of(class_names: Sequence[str]) -> str:
    """What the label space of these classes is called: "imagenet" for its names or ids in their order, else a
    name that lists of equal names, and no others, share."""
    given = tuple(class_names)
    if given in (imagenet_names(), tuple(class_of_wnid())):
        return IMAGENET
    return f"classes-{digest_of(*given)[:12]}"
