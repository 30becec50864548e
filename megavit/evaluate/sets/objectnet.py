"""ObjectNet: objects in unusual poses and places, with the 113 classes that it shares with ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megavit.evaluate.sets.image_set import Adjust, Files, ImageSet, label_lists
from megavit.evaluate.sets.imagenet import imagenet_set
from megavit.evaluate.sets.imagenet_classes import NUM_CLASSES
from megavit.evaluate.sets.origin import Origin, folder_names, image_names

_BORDER = 2  # a red border of one pixel marks the images, and scaling may have smeared it

ORIGIN = Origin(
    title="ObjectNet",
    layout="""objectnet-1.0/images/<folder>/*.png
objectnet-1.0/mappings/{folder_to_objectnet_label.json,objectnet_to_imagenet_1k.json,
    pytorch_to_imagenet_2012_id.json,imagenet_to_label_2012_v2}""",
    source="https://objectnet.dev/download.html",
    terms="its own licence: never to be trained on",
    size="about 190 GB",
    images={"test": 18_574},  # of the 113 classes; 50,273 in all
)


def objectnet(root: str | Path) -> ImageSet:
    """The images of ObjectNet (Barbu et al., 2019) whose class is one of ImageNet's as well.

    A class may be several of ImageNet's: each of them is right, and the candidates are those of all classes.
    The mapping is the one that comes with the images. MissingData, or ValueError naming the folder or the
    entry of a mapping file that does not fit.
    """
    base = ORIGIN.folder(root, "objectnet-1.0", "objectnet")
    mappings = base / "mappings"
    label_of_folder = _strings(mappings / "folder_to_objectnet_label.json")
    ids_of_label = _imagenet_ids(mappings)
    images = base / "images"
    if not images.is_dir():
        raise ORIGIN.missing(images)
    paths: list[str] = []
    labels: list[list[int]] = []
    for folder in folder_names(images):
        if folder not in label_of_folder:
            raise ValueError(
                f"ObjectNet: the folder {images / folder} is not in "
                f"{mappings / 'folder_to_objectnet_label.json'}; are these images of another version?"
            )
        ids = ids_of_label.get(label_of_folder[folder])
        if ids is not None:
            found = image_names(images / folder)
            paths += [f"{folder}/{name}" for name in found]
            labels += [ids] * len(found)
    if not paths:
        raise ORIGIN.missing(images, "holds no images of classes that ImageNet has")
    files = Files(str(images), tuple(paths))
    candidates = np.unique(np.concatenate([np.array(ids, np.int64) for ids in ids_of_label.values()]))
    found_set = imagenet_set("objectnet", "test", files, label_lists(labels), "any", candidates)
    return found_set.adjusted(Adjust(border=_BORDER))


def _imagenet_ids(mappings: Path) -> dict[str, list[int]]:
    """ImageNet's class ids by ObjectNet's label.

    The files chain: a label has ImageNet's names, separated by "; "; a name is a line of a list in the order
    of the ILSVRC devkit; and a class id, that of the sorted WordNet ids, has the number of a line from 0 on.
    """
    names_of_label = _strings(mappings / "objectnet_to_imagenet_1k.json")
    path = mappings / "pytorch_to_imagenet_2012_id.json"
    lines = ORIGIN.read_json(path)
    if not isinstance(lines, dict) or not all(
        key.isdecimal() and int(key) < NUM_CLASSES and type(line) is int for key, line in lines.items()
    ):
        raise ValueError(f"ObjectNet: {path} does not map class ids below {NUM_CLASSES} to whole numbers")
    id_of_line = {line: int(key) for key, line in lines.items()}
    names_path = ORIGIN.file(mappings / "imagenet_to_label_2012_v2")
    ids_of_name: dict[str, set[int]] = {}
    for number, name in enumerate(names_path.read_text("utf-8", "replace").splitlines()):
        if number in id_of_line:
            ids_of_name.setdefault(name.strip(), set()).add(id_of_line[number])
    found = {}
    for label, names in names_of_label.items():
        ids = [ids_of_name.get(name.strip(), set()) for name in names.split(";")]
        wrong = next((name for name, of in zip(names.split(";"), ids, strict=True) if len(of) != 1), None)
        if wrong is not None:
            raise ValueError(
                f"ObjectNet: {names_path} and {path} do not give one class of ImageNet for "
                f"{wrong.strip()!r}, which objectnet_to_imagenet_1k.json has for {label!r}; fetch "
                f"the mapping files again"
            )
        found[label] = sorted({number for of in ids for number in of})
    if not found:
        raise ValueError(f"ObjectNet: {mappings / 'objectnet_to_imagenet_1k.json'} maps no class")
    return found


def _strings(path: Path) -> dict[str, str]:
    found = ORIGIN.read_json(path)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"ObjectNet: {path} does not map names to names")
    return found
