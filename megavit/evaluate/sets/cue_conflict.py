"""Images with the shape of one thing and the texture of another (Geirhos et al., 2019), of 16 categories."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np

from megavit.data.index import IMAGE_EXTENSIONS
from megavit.evaluate.sets.image_set import Files, ImageSet, one_label
from megavit.evaluate.sets.imagenet_classes import imagenet_classes
from megavit.evaluate.sets.origin import Origin

CATEGORIES = (
    *("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog"),
    *("elephant", "keyboard", "knife", "oven", "truck"),
)
SPACE = "cue-conflict"
_NAME = re.compile(r"(?:^|_)([a-z]+)\d+-([a-z]+)\d+\.[a-z]+$")

ORIGIN = Origin(
    title="cue-conflict images",
    layout="cue-conflict/<category>/dog10-bird2.png: the shape of a dog, the texture of a bird",
    source="https://github.com/rgeirhos/texture-vs-shape (stimuli/style-transfer-preprocessed-512) or "
    "https://github.com/bethgelab/model-vs-human (cue-conflict)",
    terms="see there",
    size="about 0.4 GB",
    images={"test": 1_280},
)


def cue_conflict(root: str | Path) -> ImageSet:
    """All images, also those whose shape and texture are of one category.

    The label is the shape; `groups` has "shape" and "texture", places in `CATEGORIES`. MissingData, or
    ValueError naming a file whose name does not tell.
    """
    folder = ORIGIN.folder(root, "cue-conflict", "style-transfer-preprocessed-512", "cue_conflict")
    paths = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )
    if not paths:
        raise ORIGIN.missing(folder, "holds no images")
    cues = np.array([_cues(folder / path) for path in paths], np.int64)  # [n, 2]
    files = Files(str(folder), tuple(paths))
    return ImageSet(
        name="cue-conflict",
        split="test",
        images=files,
        labels=one_label(cues[:, 0]),
        class_names=CATEGORIES,
        space=SPACE,
        digest=files.digest(),
        groups={"shape": cues[:, 0], "texture": cues[:, 1]},
    )


@functools.cache
def category_members() -> tuple[np.ndarray, ...]:
    """ImageNet's class ids of each category, int64, in the order of `CATEGORIES`.

    A category's probability is the mean over its classes', as model-vs-human has it, not the sum: a dog would
    else win by having 109 classes.
    """
    columns = enumerate(known.category for known in imagenet_classes())
    pairs = [(category, number) for number, category in columns if category]
    return tuple(np.array([n for of, n in pairs if of == name], np.int64) for name in CATEGORIES)


def _cues(path: Path) -> tuple[int, int]:
    """Shape and texture from a file's name, checked against its folder if that is called as a category."""
    found = _NAME.search(path.name)
    if not found or not {*found.groups()} <= set(CATEGORIES):
        raise ValueError(
            f"{path} is not named by its shape and texture, as dog10-bird2.png is, with two of "
            f"{', '.join(CATEGORIES)}"
        )
    if path.parent.name in CATEGORIES and path.parent.name != found[1]:
        raise ValueError(f"{path} has the shape of a {found[1]} by its name, and lies in another's folder")
    return CATEGORIES.index(found[1]), CATEGORIES.index(found[2])
