"""Segmentation in its data sets' own on-disk formats, as samples of a picture and `mask.png`: a PNG with the
class of each pixel, 255 where it is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megavit.data.class_names import CLASSES_FILE, read_class_names
from megavit.data.images import DecodeError
from megavit.data.plane_facts import PlaneFacts
from megavit.data.planes import read_plane
from megavit.data.write import DataSet
from megavit.data.write_pairs import (
    SPLITS,
    Pair,
    PairFiles,
    notes_of,
    pairs_of_folders,
    read_lines,
    split_folders,
)

UNKNOWN = 255
_ADE_FOLDER, _ADE_CLASSES = "ADEChallengeData2016", 150
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


@dataclass(frozen=True)
class Classes:
    """Checks that a mask holds the numbers of `count` classes from `first` on, and `unknown`; `names` is the
    file that lists them. With another unknown number than 255 they are stored from 0 on, as others are."""

    count: int
    names: str
    first: int = 0
    unknown: int = UNKNOWN

    def __call__(self, values: np.ndarray) -> np.ndarray | None:
        """What is to be stored, or None for the file itself. ValueError for other numbers."""
        if values.dtype != np.uint8:
            raise ValueError(f"it has numbers of the type {values.dtype}; a mask must be a PNG of 8 bits")
        last = self.first + self.count - 1
        wrong = (values != self.unknown) & ((values < self.first) | (values > last))
        if wrong.any():
            raise ValueError(
                f"it holds the number {values[wrong][0]}, but the {self.count} classes of {self.names} are "
                f"{self.first} to {last}, and {self.unknown} is for pixels of none"
            )
        if self.first == 0 and self.unknown == UNKNOWN:
            return None
        return np.where(values == self.unknown, UNKNOWN, values - self.first).astype(np.uint8)


def _of_files(
    root: Path,
    pairs: Mapping[str, tuple[Pair, ...]],
    check: Classes,
    names: Sequence[str],
    notes: Mapping[str, str] | None = None,
) -> DataSet:
    facts = PlaneFacts(invalid=UNKNOWN, classes=check.count)
    splits = [PairFiles(root, "mask", found, check).split(name, facts) for name, found in pairs.items()]
    return DataSet(splits, names, {"mask": facts}, notes_of(notes or {}))


def ade20k_set(root: Path, wanted: Sequence[str] = SPLITS) -> DataSet:
    """ADE20K's SceneParse150 (`ADEChallengeData2016`, or a folder with it): masks count from 1, and their 0,
    other, becomes 255. Only the splits that are `wanted` are looked at."""
    if (root / _ADE_FOLDER).is_dir():
        root = root / _ADE_FOLDER
    listed = root / "objectInfo150.txt"
    names: list[str] = []
    for number, line in read_lines(listed, f"the list of classes of {_ADE_FOLDER}, extracted"):
        words = line.split(None, 5)
        if words[0] == str(len(names) + 1) and len(words) == 6:
            names.append(words[5])
        elif number > 1:
            raise ValueError(f"{listed}: line {number} is {line[:80]!r}, not class {len(names) + 1}")
    if len(names) != _ADE_CLASSES:
        raise ValueError(f"{listed} has {len(names)} classes, not {_ADE_CLASSES}")
    pairs, notes = {}, {}
    for name, part in (("train", "training"), ("val", "validation")):
        if name in wanted:
            images, masks = root / "images" / part, root / "annotations" / part
            pairs[name], notes[name] = pairs_of_folders(root, images, masks, ("png",))
    return _of_files(root, pairs, Classes(_ADE_CLASSES, str(listed), first=1, unknown=0), names, notes)


def voc_set(root: Path, wanted: Sequence[str] = SPLITS) -> DataSet:
    """Pascal VOC 2012 (`VOCdevkit/VOC2012`, or a folder above it): the lists of `ImageSets/Segmentation`;
    objects' borders are 255. Only the splits that are `wanted` are looked at."""
    places = [root / "VOCdevkit" / "VOC2012", root / "VOC2012", root]
    root = next((place for place in places if place.is_dir()), root)
    pairs = {}
    for name in (one for one in ("train", "val") if one in wanted):
        listed, found = root / "ImageSets" / "Segmentation" / f"{name}.txt", []
        for number, line in read_lines(listed, "a list of VOC2012, extracted"):
            pair = Pair(f"JPEGImages/{line}.jpg", f"SegmentationClass/{line}.png")
            for path in (pair.image, pair.plane):
                if not (root / path).is_file():
                    raise ValueError(f"{root / path} is missing, which line {number} of {listed} names")
            found.append(pair)
        pairs[name] = tuple(found)
    return _of_files(root, pairs, Classes(len(VOC_CLASSES), "VOC"), VOC_CLASSES)


def mask_set(root: Path, workers: int) -> DataSet:
    """`root/[train|val|test/]images/*.jpg` and `masks/*.png`, of the same names: numbers of classes, and 255.
    `root/classes.txt` names the classes; without it their numbers do, up to the largest in any mask."""
    pairs, notes = {}, {}
    for name, folder in split_folders(root, "images").items():
        pairs[name], notes[name] = pairs_of_folders(root, folder / "images", folder / "masks", ("png",))
    listed = root / CLASSES_FILE
    if listed.exists():
        names = read_class_names(listed)
    else:
        planes = [root / pair.plane for found in pairs.values() for pair in found]
        with ThreadPoolExecutor(workers) as pool:
            largest = tqdm(pool.map(_largest, planes), "classes in masks", len(planes), unit="mask")
            names = [str(number) for number in range(max(largest) + 1)]
    if not 0 < len(names) <= UNKNOWN:
        raise ValueError(f"{root} has {len(names)} classes, not 1 to {UNKNOWN}; {UNKNOWN} means unknown")
    return _of_files(root, pairs, Classes(len(names), str(listed)), names, notes)


def _largest(path: Path) -> int:
    """The largest number of a mask but 255; -1 for none, or where it cannot be read, which is reported when
    it is written."""
    try:
        values = read_plane(path.read_bytes(), "png", lambda width, height: None)
    except DecodeError:
        return -1
    known = values[values < UNKNOWN]
    return int(known.max()) if values.dtype == np.uint8 and known.size else -1
