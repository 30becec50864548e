"""Pictures with a plane of depth or of classes beside each: public data sets as they are downloaded, and data
of one's own. The files are listed and read by what writes shards of them.

Letters: H and W the sides of a picture.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megavit.data.class_names import class_names_beside
from megavit.data.index import IMAGE_EXTENSIONS, SOURCE_EXTENSION
from megavit.data.manifest import open_shards
from megavit.data.plane_facts import PLANES_FILE, PlaneFacts, planes_beside
from megavit.data.planes import PLANE_KINDS, check_values, known_pixels, read_plane
from megavit.data.reader import ShardReader
from megavit.data.write import DataSet
from megavit.data.write_depth import NYU_FILE, depth_set, kitti_set, nyu_set
from megavit.data.write_masks import UNKNOWN, ade20k_set, mask_set, voc_set
from megavit.evaluate.sets.image_set import MissingData, digest_of
from megavit.evaluate.sets.origin import Origin
from megavit.evaluate.sets.shards import manifest_digest, shards_of

Plane = Literal["depth", "mask"]


class Sample(NamedTuple):
    """An encoded picture and plane: `key` is what messages call it, `member` what the plane is called."""

    key: str
    image: bytes
    member: str
    plane: bytes


@dataclass(frozen=True)
class DenseSet:
    """The test pictures of a data set, each with a plane of its size.

    Args:
        name: what tables call it.
        plane: depth, or mask.
        load: the members of sample i: a picture, and `depth.png`, `depth.npy` or `mask.png`. ValueError or
            OSError if they cannot be read. It travels to worker processes.
        numbers: the samples of the set.
        facts: what the numbers of the planes mean.
        class_names: of masks, by class number.
        digest: of the samples, in their order.
        images: which pictures they are, in words, where there is a choice.
        notes: lines for the user, about files that no sample is made of.
    """

    name: str
    plane: Plane
    load: Callable[[int], Mapping[str, bytes]]
    numbers: tuple[int, ...]
    facts: PlaneFacts
    class_names: tuple[str, ...]
    digest: str
    images: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, count: int) -> DenseSet:
        """`count` samples spread evenly over the set, for a trial; itself if it has no more."""
        if count >= len(self):
            return self
        chosen = tuple(self.numbers[i * len(self) // count] for i in range(count))
        return dataclasses.replace(self, numbers=chosen, digest=digest_of(self.digest, count))

    def sample(self, index: int) -> Sample:
        """Errors as of `load`, and ValueError without a picture or a plane."""
        members = dict(self.load(self.numbers[index]))
        key = os.fsdecode(members.pop(SOURCE_EXTENSION, f"{self.name}[{self.numbers[index]}]".encode()))
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        names = [name for name in _names_of(self.plane) if name in members]
        if image is None or not names:
            wanted = " or ".join(IMAGE_EXTENSIONS if image is None else _names_of(self.plane))
            raise ValueError(f"{key}: it has {', '.join(members)} but no {wanted}")
        return Sample(key, image, names[0], members[names[0]])

    def values(self, member: str, data: bytes, height: int, width: int) -> np.ndarray:
        """A plane as it counts: metres, float64 [H, W], 0 where they are not known, or class numbers, uint8
        [H, W], UNKNOWN where there is none. ValueError for one of another size than H x W, with other
        classes, or of which nothing is known."""

        def check_size(w: int, h: int) -> None:
            if (w, h) != (width, height):
                raise ValueError(f"its {member} has {w}x{h} pixels, but its picture {width}x{height}")

        stored = read_plane(data, member.rpartition(".")[2], check_size)
        if stored.shape[2] != 1:
            raise ValueError(f"its {member} has {stored.shape[2]} channels, not 1")
        invalid = self.facts.invalid if self.facts.invalid is not None else self._unknown
        classes = len(self.class_names) if self.plane == "mask" else None
        check_values(stored, invalid, classes, False, member)
        known = known_pixels(stored, invalid)
        if self.plane == "depth":
            return (np.where(known, stored, 0) * self.facts.scale)[:, :, 0].astype(np.float64)
        return np.where(known, stored, UNKNOWN)[:, :, 0].astype(np.uint8)

    @property
    def _unknown(self) -> int:
        return 0 if self.plane == "depth" else UNKNOWN


def _names_of(plane: Plane) -> list[str]:
    return [f"{plane}.{kind}" for kind in (PLANE_KINDS if plane == "depth" else ("png",))]


# Public data sets

NYU_ORIGIN = Origin(
    title="NYU Depth v2",
    layout=f"""nyu/{NYU_FILE} and nyu/splits.mat (654 test pictures), or
nyu/official_splits/test/SCENE/rgb_*.jpg with sync_depth_*.png, in millimetres""",
    source="https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html",
    terms="see the page",
    size="2.8 GB",
    images={"test": 654},
)
KITTI_ORIGIN = Origin(
    title="KITTI depth",
    layout="""kitti/DATE/DRIVE_sync/image_02/data/*.png (raw data), and
kitti/data_depth_annotated/{train,val}/DRIVE_sync/proj_depth/groundtruth/image_02/*.png;
the pictures of --kitti_list (Eigen's list: 652 of its 697 have depth), or all of the annotated val""",
    source="https://www.cvlibs.net/datasets/kitti",
    terms="a registration; CC BY-NC-SA 3.0",
    size="175 GB raw, of which the drives of the list will do, and 14 GB of depth",
    images={},
)
ADE20K_ORIGIN = Origin(
    title="ADE20K, SceneParse150",
    layout="""ADEChallengeData2016/images/validation/ADE_val_*.jpg,
ADEChallengeData2016/annotations/validation/ADE_val_*.png and ADEChallengeData2016/objectInfo150.txt""",
    source="http://sceneparsing.csail.mit.edu",
    terms="non-commercial research and education",
    size="0.9 GB",
    images={"test": 2000},
)
VOC_ORIGIN = Origin(
    title="Pascal VOC 2012, segmentation",
    layout="VOCdevkit/VOC2012/{JPEGImages,SegmentationClass} and ImageSets/Segmentation/val.txt",
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    terms="Flickr's terms of use",
    size="1.9 GB",
    images={"test": 1449},
)


def nyu(root: str | Path) -> DenseSet:
    """The test pictures, of the labeled file or of the folders."""
    folder = NYU_ORIGIN.folder(root, "nyu", "nyu_depth_v2")
    if not (folder / NYU_FILE).is_file() and not (folder / "official_splits" / "test").is_dir():
        raise NYU_ORIGIN.missing(folder / NYU_FILE)
    return _of(nyu_set(folder, None, None, ("test",)), "nyu", "depth", "test")


def kitti(root: str | Path, test_list: str = "") -> DenseSet:
    """The pictures of a list such as Eigen's, or those of the annotated depth's val."""
    folder = KITTI_ORIGIN.folder(root, "kitti")
    annotated = folder / "data_depth_annotated"
    if not annotated.is_dir() and not (folder / "val").is_dir():
        raise KITTI_ORIGIN.missing(annotated)
    if not test_list:
        found = _of(kitti_set(folder, None, None, None, ("val",)), "kitti", "depth", "val")
        return dataclasses.replace(found, images="val of the annotated depth")
    found = _of(kitti_set(folder, None, None, Path(test_list)), "kitti", "depth", "test")
    return dataclasses.replace(found, images=Path(test_list).name)


def ade20k(root: str | Path) -> DenseSet:
    """The 2,000 validation pictures."""
    folder = ADE20K_ORIGIN.folder(root, "ADEChallengeData2016", "ade20k")
    part = folder / "ADEChallengeData2016" if (folder / "ADEChallengeData2016").is_dir() else folder
    ADE20K_ORIGIN.file(part / "objectInfo150.txt")
    return _of(ade20k_set(folder, ("val",)), "ade20k", "mask", "val")


def voc(root: str | Path) -> DenseSet:
    """The pictures of val.txt."""
    folder = VOC_ORIGIN.folder(root, "VOCdevkit", "VOC2012", "voc")
    places = (folder, folder / "VOCdevkit" / "VOC2012", folder / "VOC2012")
    VOC_ORIGIN.file(*(place / "ImageSets" / "Segmentation" / "val.txt" for place in places))
    return _of(voc_set(folder, ("val",)), "voc", "mask", "val")


def _of(found: DataSet, name: str, plane: Plane, split: str) -> DenseSet:
    part = next(one for one in found.splits if one.name == split)
    return DenseSet(
        name,
        plane,
        part.load,
        tuple(range(part.size)),
        found.planes[plane],
        tuple(found.class_names),
        digest_of(part.fingerprint),
        notes=tuple(found.notes),
    )


# Data of one's own


@dataclass(frozen=True)
class _ShardPlanes:
    """Loads samples of shards; `first` is int64 [shards + 1], the number of each shard's first sample."""

    reader: ShardReader
    first: np.ndarray
    plane: Plane

    def __call__(self, number: int) -> dict[str, bytes]:
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        sample = number - int(self.first[shard])
        members = self.reader.members(shard, sample)
        wanted = [name for name in (*IMAGE_EXTENSIONS, *_names_of(self.plane)) if name in members]
        data = self.reader.read(shard, sample, [members[name] for name in wanted])
        rest = dict.fromkeys(members, b"")  # for messages about what is missing
        key = f"{self.reader.manifest.urls[shard].rsplit('/', 1)[-1]}/{self.reader.key(shard, sample)}"
        return rest | dict(zip(wanted, data, strict=True)) | {SOURCE_EXTENSION: os.fsencode(key)}


def own_dense(root: str | Path, plane: Plane, workers: int = 1) -> DenseSet:
    """The test pictures in a folder of one's own: its shards with planes, or its folders of pictures and
    planes. MissingData if it holds neither."""
    root = Path(root)
    name = root.resolve().name
    if shards := shards_of(root, "test") or shards_of(root, "val"):
        return _own_shards(shards, name, plane)
    pictures = {"depth": "rgb", "mask": "images"}[plane]
    if not any((root / part / pictures).is_dir() for part in ("test", "val", ".")):
        raise MissingData(f"{root} holds no test pictures with {plane}. Expected: {OWN_LAYOUTS[plane]}")
    found = depth_set(root, None, 0, None) if plane == "depth" else mask_set(root, workers)
    names = [split.name for split in found.splits]
    return _of(found, name, plane, next(one for one in ("test", "val", "train") if one in names))


def _own_shards(shards: str, name: str, plane: Plane) -> DenseSet:
    beside = planes_beside(shards)
    if plane not in beside:
        raise MissingData(
            f"{Path(shards).parent / PLANES_FILE} does not say what the {plane} of {shards} means; "
            f"launch/shards.py writes it, e.g. {_EXAMPLES[plane]}"
        )
    names = tuple(class_names_beside(shards))
    if plane == "mask" and not names:
        names = tuple(map(str, range(beside[plane].classes or UNKNOWN)))
    manifest = open_shards(shards, progress=True)
    first = np.concatenate([[0], np.cumsum(manifest.samples)]).astype(np.int64)
    load = _ShardPlanes(ShardReader(manifest), first, plane)
    numbers = tuple(range(int(first[-1])))
    return DenseSet(name, plane, load, numbers, beside[plane], names, manifest_digest(manifest))


_EXAMPLES = {
    "depth": '{"depth": {"scale": 0.001, "invalid": 0, "max_m": 10}}',
    "mask": '{"mask": {"invalid": 255, "classes": 150}}',
}
_SHARDS = f"{{test,val}}.manifest.json or {{test,val}}-*.tar with {PLANES_FILE} (see launch/shards.py)"
OWN_LAYOUTS: dict[Plane, str] = {
    "depth": f"{_SHARDS}, or [test/ or val/]rgb/*.jpg and depth/*.npy or *.png with {PLANES_FILE}",
    "mask": f"{_SHARDS}, or [test/ or val/]images/*.jpg and masks/*.png, with classes.txt",
}
