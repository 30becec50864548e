"""Any folder of images with a folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megavit.data.write import Files as WrittenFiles
from megavit.data.write import class_names, folder_splits
from megavit.evaluate.sets.image_set import Files, ImageSet, one_label
from megavit.evaluate.sets.imagenet_classes import class_of_wnid, imagenet_names, space_of
from megavit.evaluate.sets.origin import Origin

ORIGIN = Origin(
    title="a folder of images",
    layout="""DIR/{train,val,test}/<class>/*.{jpg,jpeg,png,webp}, where the test images are those of test, or
of val if there is none; or DIR/<class>/*, which are test images""",
    source="yourself",
    terms="yours",
    size="any",
    images={},
)


def image_folder(root: str | Path, split: Literal["train", "test"] = "test") -> ImageSet:
    """The images of `root/train` or, as "test", of `root/test`, else `root/val`, else of `root` itself.

    Classes are the sorted folders of train, or of the split if there is no train. If they are ImageNet's 1000
    WordNet ids, the label space is ImageNet's. MissingData, or ValueError for a split with classes that train
    lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise ORIGIN.missing(root)
    there = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    wanted = ["train"] if split == "train" else ["test", "val"]
    chosen = next((name for name in wanted if name in there), None)
    if chosen is None and (there or split == "train"):
        raise ORIGIN.missing(root / wanted[0])
    # Without train, the classes are those of the split; such a folder's only split is called train there.
    base, part = (root, chosen) if "train" in there else (root / (chosen or "."), "train")
    found = next(other for other in folder_splits(base) if other.name == part)
    assert isinstance(found.load, WrittenFiles)
    files = Files(str(base), found.load.paths)
    folders = tuple(class_names(base))
    names = imagenet_names() if folders == tuple(class_of_wnid()) else folders
    labels = one_label(found.load.labels)
    name = root.resolve().name or str(root)
    return ImageSet(name, split, files, labels, names, space_of(names), files.digest())
