"""ImageNet (ILSVRC 2012) as it is downloaded, and ReaL's labels of its validation images.

Classes are mapped by WordNet id, never by the place of a folder. The validation images are in the order of
their numbers whatever the layout, so that ImageNet and ReaL share one pass over them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megavit.evaluate.sets.image_set import Files, ImageSet, label_lists, one_label
from megavit.evaluate.sets.imagenet_classes import IMAGENET, NUM_CLASSES, class_of_wnid, imagenet_names
from megavit.evaluate.sets.origin import Origin, folder_names, image_names

_NAMES = ("imagenet", "ILSVRC2012", "imagenet-1k")
_KAGGLE = Path("ILSVRC") / "Data" / "CLS-LOC"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_DEVKITS = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "data", ".")

ORIGIN = Origin(
    title="ImageNet",
    layout="""imagenet/ (or ILSVRC2012/, imagenet-1k/, or the data root itself) with
train/<WordNet id>/*.JPEG
val/<WordNet id>/*.JPEG, or as it is downloaded: val/ILSVRC2012_val_00000001.JPEG ... with the devkit's
    ILSVRC2012_devkit_t12/data/{meta.mat,ILSVRC2012_validation_ground_truth.txt},
    or with Kaggle's LOC_val_solution.csv""",
    source="https://image-net.org/download.php",
    terms="registration; for research that is not commercial",
    size="about 145 GB",
    images={"train": 1_281_167, "test": 50_000},
)
REAL_ORIGIN = Origin(
    title="ImageNet-ReaL",
    layout="imagenet/real.json (or real.json, imagenet-real/real.json) beside ImageNet's validation images",
    source="https://github.com/google-research/reassessed-imagenet",
    terms="Apache-2.0",
    size="0.4 MB",
    images={"test": 50_000},
)


def imagenet(root: str | Path, split: Literal["train", "test"] = "test") -> ImageSet:
    """ILSVRC 2012; "test" are the validation images, in the order of their numbers.

    MissingData names what is not there; ValueError a folder or label that is none of the 1000 classes.
    """
    if split == "test":
        files, ids = _validation(root)
    else:
        folder = _split_folder(root, "train")
        files, ids = by_wnid(folder, class_of_wnid(), ORIGIN)
    return imagenet_set("imagenet", split, files, one_label(ids))


def imagenet_real(root: str | Path) -> ImageSet:
    """ImageNet's validation images with the labels of Beyer et al. (2020): each label of an image is right,
    and the 3,163 images without one are left out of the score.

    The list has the label lists of images 1 to 50,000. MissingData, or ValueError for a damaged list.
    """
    places = [place / "real.json" for place in (*_bases(root), Path(root) / "imagenet-real", Path(root))]
    path = REAL_ORIGIN.file(*places)
    lists = REAL_ORIGIN.read_json(path)
    if not isinstance(lists, list) or not all(_are_classes(ids) for ids in lists):
        raise ValueError(f"{path} is no list of lists of class numbers from 0 to {NUM_CLASSES - 1}")
    files, _ = _validation(root)
    numbers = [_number(Path(files.root) / path) for path in files.paths]
    if numbers and numbers[-1] > len(lists):
        raise ValueError(f"{path} has the labels of {len(lists)} images; there is image {numbers[-1]}")
    labels = label_lists([lists[number - 1] for number in numbers])
    return imagenet_set("imagenet-real", "test", files, labels, right="any")


def imagenet_set(
    name: str,
    split: Literal["train", "test"],
    files: Files,
    labels: np.ndarray,
    right: Literal["one", "any"] = "one",
    candidates: np.ndarray | None = None,
) -> ImageSet:
    """A set of files with labels in ImageNet's classes."""
    return ImageSet(name, split, files, labels, imagenet_names(), IMAGENET, files.digest(), right, candidates)


def by_wnid(
    folder: Path, known: Mapping[str, int], origin: Origin, some: str = "one of the 1000 of ILSVRC 2012"
) -> tuple[Files, list[int]]:
    """The images of `folder/<WordNet id>/` and their class ids, by folder and name.

    MissingData if there are none, ValueError naming a folder that is not in `known`.
    """
    paths: list[str] = []
    ids: list[int] = []
    for name in folder_names(folder):
        if name not in known:
            raise ValueError(
                f"{origin.title}: the folder {folder / name} is no WordNet id that belongs here ({some}), so "
                f"it has no class; remove it or name the right data root"
            )
        found = image_names(folder / name)
        paths += [f"{name}/{image}" for image in found]
        ids += [known[name]] * len(found)
    if not paths:
        raise origin.missing(folder, "holds no images in class folders")
    return Files(str(folder), tuple(paths)), ids


def _bases(root: str | Path) -> list[Path]:
    """The folders that may be ImageNet's."""
    return [*(Path(root) / name for name in _NAMES), Path(root)]


def _split_folder(root: str | Path, name: str) -> Path:
    for base in _bases(root):
        for folder in (base / name, base / _KAGGLE / name):
            if folder.is_dir():
                return folder
    raise ORIGIN.missing(Path(root) / _NAMES[0] / name)


def _validation(root: str | Path) -> tuple[Files, list[int]]:
    """The validation images in the order of their numbers, and their class ids."""
    folder = _split_folder(root, "val")
    if folder_names(folder):
        files, ids = by_wnid(folder, class_of_wnid(), ORIGIN)
        order = sorted(range(len(ids)), key=lambda i: files.paths[i].rpartition("/")[2])
        return Files(files.root, tuple(files.paths[i] for i in order)), [ids[i] for i in order]
    names = image_names(folder)
    if not names:
        raise ORIGIN.missing(folder, "holds no images")
    wnids = _wnids_of_flat(folder, [_number(folder / name) for name in names])
    return Files(str(folder), tuple(names)), [_class_of(wnid, folder) for wnid in wnids]


def _number(path: Path) -> int:
    """A validation image's number, from its name."""
    found = _VAL_NAME.match(path.name)
    if not found or int(found[1]) < 1:
        raise ValueError(
            f"{path} is not called as ImageNet's validation images are, ILSVRC2012_val_00000001.JPEG, so it "
            f"has no label; sort the images into folders named by their WordNet ids, or remove it"
        )
    return int(found[1])


def _class_of(wnid: str, source: Path) -> int:
    try:
        return class_of_wnid()[wnid]
    except KeyError:
        raise ValueError(f"the label {wnid!r} of an image in {source} is no class of ILSVRC 2012") from None


def _wnids_of_flat(folder: Path, numbers: Sequence[int]) -> Iterable[str]:
    """The WordNet ids of validation images that lie in one folder, from the devkit or Kaggle's list."""
    base = folder.parents[len(_KAGGLE.parts)] if folder.parent.match(str(_KAGGLE)) else folder.parent
    # The devkit may lie beside ImageNet's folder, where it was unpacked.
    devkits = [place / devkit for place in (base, base.parent) for devkit in _DEVKITS]
    truth = next((path / _TRUTH for path in devkits if (path / _TRUTH).is_file()), None)
    solution = base / "LOC_val_solution.csv"
    if truth is None and solution.is_file():
        labels = _read_solution(solution)
    elif truth is None:
        raise ORIGIN.missing(
            devkits[0] / _TRUTH,
            f"does not exist, and neither does {solution}: {folder} holds its images without class folders, "
            f"so their labels are unknown",
        )
    else:
        labels = _read_devkit(truth)
    without = next((number for number in numbers if number not in labels), None)
    if without is not None:
        raise ValueError(
            f"{truth or solution} has labels of {len(labels)} images and none of number {without}, which is "
            f"in {folder}; it may be cut off: fetch it again"
        )
    return [labels[number] for number in numbers]


def _read_devkit(truth: Path) -> dict[int, str]:
    """WordNet id by image number. The devkit's class numbers are its own: 1 to 1000, not in the order of the
    WordNet ids, which meta.mat lists."""
    from scipy.io import loadmat

    meta = ORIGIN.file(truth.parent / "meta.mat", truth.parent.parent / "meta.mat")
    try:
        synsets = np.atleast_1d(loadmat(str(meta), squeeze_me=True)["synsets"])
        numbered = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        wnids = {int(number): str(wnid) for number, wnid in numbered}
    except Exception as error:  # a damaged file raises whatever the reader runs into
        raise ValueError(
            f"{meta} is not the devkit's table of classes ({type(error).__name__}: {error})"
        ) from error
    labels = {}
    for number, line in enumerate(truth.read_text("utf-8", "replace").split(), 1):
        if not line.isdecimal() or int(line) not in wnids:
            raise ValueError(f"{truth}, line {number}: {line[:40]!r} is no class number of {meta}")
        labels[number] = wnids[int(line)]
    return labels


def _read_solution(path: Path) -> dict[int, str]:
    """WordNet id by image number, from Kaggle's list `ImageId,PredictionString`, where the second column is
    "WNID x y x y ..."."""
    labels = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name, boxes = row.get("ImageId") or "", (row.get("PredictionString") or "").split()
            if not boxes:
                raise ValueError(f"{path}: the row of {name!r} has no PredictionString")
            labels[_number(path.parent / name)] = boxes[0]
    return labels


def _are_classes(ids: object) -> bool:
    return isinstance(ids, list) and all(type(number) is int and 0 <= number < NUM_CLASSES for number in ids)
