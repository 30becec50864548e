"""Every data set that is known by name: how it is read, where it is to be had, and whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from megavit.evaluate.sets import (
    celeba,
    cifar,
    cue_conflict,
    dense,
    imagenet,
    imagenet_variants,
    objectnet,
)
from megavit.evaluate.sets.dense import DenseSet
from megavit.evaluate.sets.image_set import ImageSet, MissingData
from megavit.evaluate.sets.imagenet_variants import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, imagenet_c
from megavit.evaluate.sets.origin import Origin

Split = Literal["train", "test"]
_Set = TypeVar("_Set", ImageSet, DenseSet)


@dataclass(frozen=True)
class Entry(Generic[_Set]):
    """A data set. `read` takes the data root and, if there are two `splits`, one of them."""

    name: str
    origin: Origin
    splits: tuple[Split, ...]
    read: Callable[..., _Set]

    def open(self, root: str | Path, split: Split = "test") -> _Set:
        """A split. ValueError if the set has none of this name; errors of the reader."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {' and '.join(self.splits)}")
        return self.read(root, split) if len(self.splits) > 1 else self.read(root)


@dataclass(frozen=True)
class Found:
    """Whether a set is there. `images` are those of each split that is; `problem` says what is missing (its
    first line: which path), or why it cannot be used."""

    entry: Entry[Any]
    state: Literal["found", "partly", "missing", "unusable"]
    images: dict[str, int]
    problem: str = ""


_BOTH: tuple[Split, ...] = ("train", "test")
_TEST: tuple[Split, ...] = ("test",)

CATALOGUE: dict[str, Entry[ImageSet]] = {
    entry.name: entry
    for entry in (
        Entry("imagenet", imagenet.ORIGIN, _BOTH, imagenet.imagenet),
        Entry("imagenet-real", imagenet.REAL_ORIGIN, _TEST, imagenet.imagenet_real),
        Entry("imagenet-v2", imagenet_variants.V2_ORIGIN, _TEST, imagenet_variants.imagenet_v2),
        Entry("imagenet-r", imagenet_variants.R_ORIGIN, _TEST, imagenet_variants.imagenet_r),
        Entry("imagenet-a", imagenet_variants.A_ORIGIN, _TEST, imagenet_variants.imagenet_a),
        Entry("imagenet-sketch", imagenet_variants.SKETCH_ORIGIN, _TEST, imagenet_variants.imagenet_sketch),
        Entry("objectnet", objectnet.ORIGIN, _TEST, objectnet.objectnet),
        Entry("cifar10", cifar.ORIGIN_10, _BOTH, cifar.cifar10),
        Entry("cifar100", cifar.ORIGIN_100, _BOTH, cifar.cifar100),
        Entry("celeba", celeba.ORIGIN, _BOTH, celeba.celeba),
        Entry("cue-conflict", cue_conflict.ORIGIN, _TEST, cue_conflict.cue_conflict),
        *(
            Entry(
                f"imagenet-c/{corruption}/{severity}",
                imagenet_variants.C_ORIGIN,
                _TEST,
                partial(imagenet_c, corruption=corruption, severity=severity),
            )
            for corruption in (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
            for severity in SEVERITIES
        ),
    )
}


# With a plane of depth or of classes beside each picture.
DENSE_SETS: dict[str, Entry[DenseSet]] = {
    entry.name: entry
    for entry in (
        Entry("nyu", dense.NYU_ORIGIN, _TEST, dense.nyu),
        Entry("kitti", dense.KITTI_ORIGIN, _TEST, dense.kitti),
        Entry("ade20k", dense.ADE20K_ORIGIN, _TEST, dense.ade20k),
        Entry("voc", dense.VOC_ORIGIN, _TEST, dense.voc),
    )
}


def find(root: str | Path) -> list[Found]:
    """Which sets are below the data root: ImageNet-C as one (its first part stands for it, and `images`
    counts the parts of the 15 and of the extra corruptions), every other set by itself. Never raises.

    Lists every folder of the sets that are there, and reads no image.
    """
    found = [_found(entry, root) for name, entry in CATALOGUE.items() if not name.startswith("imagenet-c/")]
    return [*found, *(_found(entry, root) for entry in DENSE_SETS.values()), _found_c(root)]


def describe(found: Sequence[Found]) -> str:
    """`find`'s answer as text: each set, whether it is there, and where else it would have to be."""
    lines = []
    for one in found:
        name = "imagenet-c" if one.entry.name.startswith("imagenet-c/") else one.entry.name
        counts = ", ".join(f"{split} {count:,}{_of(one, split)}" for split, count in one.images.items())
        lines.append(f"{name:16} {one.state:9} {counts}".rstrip())
        if one.problem:
            lines += [f"    {line}" for line in one.problem.splitlines()]
    return "\n".join(lines)


def _of(found: Found, split: str) -> str:
    """The published number, where it differs."""
    published = found.entry.origin.images.get(split, 0)
    return f" of {published:,}" if published and published != found.images[split] else ""


def _found(entry: Entry[Any], root: str | Path) -> Found:
    images: dict[str, int] = {}
    missing: list[str] = []
    unusable: list[str] = []
    for split in entry.splits:
        try:
            images[split] = len(entry.open(root, split))
        except MissingData as error:
            missing.append(str(error))
        except Exception as error:  # a list of what is there must come to its end
            unusable.append(f"{split}: {error}")
    problem = "\n".join((*unusable, *missing[:1]))  # the layout, once
    if unusable:
        return Found(entry, "unusable", images, problem)
    return Found(entry, "missing" if not images else "partly" if missing else "found", images, problem)


def _found_c(root: str | Path) -> Found:
    entry = CATALOGUE[f"imagenet-c/{CORRUPTIONS[0]}/{SEVERITIES[0]}"]
    try:
        parts = imagenet_variants.imagenet_c_parts(root)
    except MissingData as error:
        return Found(entry, "missing", {}, str(error))
    except Exception as error:
        return Found(entry, "unusable", {}, str(error))
    usual = [part for part in parts if part[0] in CORRUPTIONS]
    images = {"parts": len(usual), "extra parts": len(parts) - len(usual)}
    wanted = len(CORRUPTIONS) * len(SEVERITIES)
    if len(usual) == wanted:
        return Found(entry, "found", images)
    every = ((name, severity) for name in CORRUPTIONS for severity in SEVERITIES)
    lacking = [f"{name}/{severity}" for name, severity in every if (name, severity) not in usual]
    some = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    problem = f"{entry.origin.title}: {len(lacking)} of the {wanted} parts are missing: {some}"
    return Found(entry, "partly" if usual else "missing", images, problem)
