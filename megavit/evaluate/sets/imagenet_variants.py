"""Sets of other images in ImageNet's classes: V2, -R, -A, -Sketch, and its corrupted validation images, -C.

-A and -R have 200 of the classes each. The candidates are always those 200 as published, also if folders are
missing: fewer candidates would make the task easier and the number better than it is. A folder of another
class means that these are other data, and is an error.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megavit.evaluate.sets.image_set import Adjust, Files, ImageSet, one_label
from megavit.evaluate.sets.imagenet import by_wnid, imagenet_set
from megavit.evaluate.sets.imagenet_classes import (
    NUM_CLASSES,
    class_of_wnid,
    classes_also_in,
    imagenet_classes,
)
from megavit.evaluate.sets.origin import Origin, folder_names, image_names

_CATEGORIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
CORRUPTIONS = tuple(
    name for category, names in _CATEGORIES.items() if category != "extra" for name in names
)  # the 15 of mCE
EXTRA_CORRUPTIONS = _CATEGORIES["extra"]  # never part of mCE
SEVERITIES = (1, 2, 3, 4, 5)

V2_ORIGIN = Origin(
    title="ImageNet-V2",
    layout="imagenetv2-matched-frequency-format-val/<class number 0 to 999>/*.jpeg (also below imagenet-v2/)",
    source="https://huggingface.co/datasets/vaishaal/ImageNetV2",
    terms="MIT",
    size="about 1.3 GB",
    images={"test": 10_000},
)
R_ORIGIN = Origin(
    title="ImageNet-R",
    layout="imagenet-r/<WordNet id>/*.jpg, 200 folders",
    source="https://github.com/hendrycks/imagenet-r",
    terms="MIT",
    size="about 2 GB",
    images={"test": 30_000},
)
A_ORIGIN = Origin(
    title="ImageNet-A",
    layout="imagenet-a/<WordNet id>/*.jpg, 200 folders",
    source="https://github.com/hendrycks/natural-adv-examples",
    terms="MIT",
    size="about 0.7 GB",
    images={"test": 7_500},
)
SKETCH_ORIGIN = Origin(
    title="ImageNet-Sketch",
    layout="imagenet-sketch/sketch/<WordNet id>/*.JPEG (or one of the two folders alone)",
    source="https://github.com/HaohanWang/ImageNet-Sketch",
    terms="MIT",
    size="about 8 GB",
    images={"test": 50_889},
)
C_ORIGIN = Origin(
    title="ImageNet-C",
    layout="""imagenet-c/<category>/<corruption>/<severity 1 to 5>/<WordNet id>/*.JPEG, of the categories
noise, blur, weather, digital and extra, or without the folder of the category""",
    source="https://zenodo.org/records/2235448",
    terms="CC BY 4.0",
    size="about 60 GB in five tars",
    images={"test": 50_000},  # of each corruption and severity
)


def imagenet_v2(root: str | Path) -> ImageSet:
    """ImageNet-V2, matched frequency (Recht et al., 2019). Its folders are class numbers: 10 is not 2nd."""
    name = "imagenetv2-matched-frequency-format-val"
    folder = V2_ORIGIN.folder(root, name, f"imagenet-v2/{name}", f"imagenetv2/{name}", "imagenet-v2")
    numbers = {str(number): number for number in range(NUM_CLASSES)}
    paths: list[str] = []
    ids: list[int] = []
    unknown = next((other for other in folder_names(folder) if other not in numbers), None)
    if unknown is not None:
        raise ValueError(
            f"ImageNet-V2: the folder {folder / unknown} is no class number from 0 to {NUM_CLASSES - 1}"
        )
    for number in sorted(map(int, folder_names(folder))):
        found = image_names(folder / str(number))
        paths += [f"{number}/{image}" for image in found]
        ids += [number] * len(found)
    if not paths:
        raise V2_ORIGIN.missing(folder, "holds no images in class folders")
    return imagenet_set("imagenet-v2", "test", Files(str(folder), tuple(paths)), one_label(ids))


def imagenet_r(root: str | Path) -> ImageSet:
    """ImageNet-R (Hendrycks et al., 2021): art, cartoons, toys and the like of 200 classes."""
    return _of_200_classes(root, R_ORIGIN, "imagenet-r", "r")


def imagenet_a(root: str | Path) -> ImageSet:
    """ImageNet-A (Hendrycks et al., 2021): photographs of 200 classes that a ResNet-50 gets wrong."""
    return _of_200_classes(root, A_ORIGIN, "imagenet-a", "a")


def imagenet_sketch(root: str | Path) -> ImageSet:
    """ImageNet-Sketch (Wang et al., 2019): drawings of all 1000 classes."""
    folder = SKETCH_ORIGIN.folder(root, "imagenet-sketch", "ImageNet-Sketch", "sketch")
    if folder_names(folder) == ["sketch"]:
        folder = folder / "sketch"
    files, ids = by_wnid(folder, class_of_wnid(), SKETCH_ORIGIN)
    return imagenet_set("imagenet-sketch", "test", files, one_label(ids))


def imagenet_c(root: str | Path, corruption: str, severity: int) -> ImageSet:
    """One corruption of ImageNet-C (Hendrycks & Dietterich, 2019) at one severity.

    The images have 224 pixels and are cropped already: they are used whole. ValueError for a corruption or
    severity that there is not.
    """
    if corruption not in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
        names = ", ".join((*CORRUPTIONS, *EXTRA_CORRUPTIONS))
        raise ValueError(f"ImageNet-C has no corruption {corruption!r}; it has {names}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity}; ImageNet-C has 1 to 5")
    found = _corruption_folder(C_ORIGIN.folder(root, *_C_NAMES), corruption, severity)
    if not found.is_dir():
        raise C_ORIGIN.missing(found)
    files, ids = by_wnid(found, class_of_wnid(), C_ORIGIN)
    name = f"imagenet-c/{corruption}/{severity}"
    return imagenet_set(name, "test", files, one_label(ids)).adjusted(Adjust(whole=True))


def imagenet_c_parts(root: str | Path) -> list[tuple[str, int]]:
    """The corruptions and severities that are there, the extra ones too."""
    folder = C_ORIGIN.folder(root, *_C_NAMES)
    every = [(name, severity) for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS) for severity in SEVERITIES]
    return [part for part in every if _corruption_folder(folder, *part).is_dir()]


_C_NAMES = ("imagenet-c", "ImageNet-C", "Imagenet-C")


def _corruption_folder(folder: Path, corruption: str, severity: int) -> Path:
    category = next(category for category, names in _CATEGORIES.items() if corruption in names)
    without = folder / corruption / str(severity)
    return without if without.is_dir() else folder / category / corruption / str(severity)


def _of_200_classes(root: str | Path, origin: Origin, name: str, letter: str) -> ImageSet:
    folder = origin.folder(root, name, origin.title)
    candidates = classes_also_in(letter)
    known = {imagenet_classes()[number].wnid: int(number) for number in candidates}
    files, ids = by_wnid(folder, known, origin, f"one of the 200 of {origin.title}")
    found = imagenet_set(name, "test", files, one_label(ids))
    return dataclasses.replace(found, candidates=candidates)
