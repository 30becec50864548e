"""CelebA: faces with 40 attributes that are there or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from megavit.evaluate.sets.image_set import Files, ImageSet, one_label
from megavit.evaluate.sets.origin import Origin, image_names

_PARTS = {"train": "0", "test": "2"}  # of list_eval_partition.txt; 1 are the validation images
_TARGET = "Smiling"

ORIGIN = Origin(
    title="CelebA",
    layout="""celeba/img_align_celeba/000001.jpg ...
celeba/list_attr_celeba.txt and celeba/list_eval_partition.txt (the text files, not Kaggle's csv)""",
    source="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    terms="for research that is not commercial",
    size="about 1.4 GB",
    images={"train": 162_770, "test": 19_962},
)


def celeba(root: str | Path, split: Literal["train", "test"] = "test", target: str = _TARGET) -> ImageSet:
    """CelebA (Liu et al., 2015) with one attribute as the class, by default Smiling.

    `groups` has every attribute, 1 where it is there and else 0. MissingData names what is not there, images
    too; ValueError a file that is damaged, or the attributes if `target` is none.
    """
    base = ORIGIN.folder(root, "celeba", "CelebA")
    attribute_file = ORIGIN.file(base / "list_attr_celeba.txt", base / "Anno" / "list_attr_celeba.txt")
    part_file = ORIGIN.file(base / "list_eval_partition.txt", base / "Eval" / "list_eval_partition.txt")
    attributes, rows = _read_attributes(attribute_file)
    if target not in attributes:
        raise ValueError(f"CelebA has no attribute {target!r}; it has {', '.join(attributes)}")
    names = [name for name, part in _read_parts(part_file) if part == _PARTS[split]]
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise ValueError(
            f"{attribute_file} lacks {len(unknown)} of the images of {part_file}, e.g. {unknown[0]}"
        )
    if not names:
        raise ValueError(f"{part_file} has no image of the part {_PARTS[split]} ({split})")
    places = [base / place / "img_align_celeba" for place in (".", "Img", "img_align_celeba")]
    folder = next((place for place in reversed(places) if place.is_dir()), places[0])
    if not folder.is_dir():
        raise ORIGIN.missing(folder)
    there = set(image_names(folder))
    gone = [name for name in names if name not in there]
    if gone:
        some = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        raise ORIGIN.missing(folder, f"lacks {len(gone)} of the {len(names)} images of {split}: {some}")
    table = np.array([rows[name] for name in names], np.int64)  # [n, attributes]
    groups = {name: table[:, column] for column, name in enumerate(attributes)}
    files = Files(os.path.normpath(folder), tuple(names))
    return ImageSet(
        name="celeba",
        split=split,
        images=files,
        labels=one_label(groups[target]),
        class_names=(f"not {target}", target),
        space=f"celeba-{target.lower()}",
        digest=files.digest(),
        groups=groups,
    )


def _read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The attributes' names, and for each image 1 (there) or 0 by attribute.

    The file has the number of images, the names, and rows `000001.jpg -1 1 ...`.
    """
    lines = path.read_text("utf-8", "replace").splitlines()
    if len(lines) < 2 or not lines[0].strip().isdecimal():
        raise ValueError(f"{path} does not begin with the number of images and the names of attributes")
    attributes = lines[1].split()
    values = {"-1": 0, "1": 1}
    rows: dict[str, list[int]] = {}
    for number, line in enumerate(lines[2:], 3):
        name, *marks = line.split() or [""]
        if len(marks) != len(attributes) or not values.keys() >= set(marks):
            raise ValueError(f"{path}, line {number}: there are not {len(attributes)} numbers -1 or 1")
        rows[name] = [values[mark] for mark in marks]
    if len(rows) != int(lines[0]):
        raise ValueError(f"{path} has {len(rows)} images, its first line says {lines[0].strip()}: cut off?")
    return attributes, rows


def _read_parts(path: Path) -> list[tuple[str, str]]:
    """(image, part) in the order of the file, whose rows are `000001.jpg 0`."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(f"{path}, line {number}: {line[:40]!r} is no image with its part 0, 1 or 2")
        rows.append((words[0], words[1]))
    return rows
