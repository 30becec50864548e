"""Depth in its data sets' own on-disk formats, as samples of a picture and `depth.png` or `depth.npy`.

Files of depth are stored as they are, whatever their unit: `dense.json` beside the shards says it.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megavit.data.index import IMAGE_EXTENSIONS
from megavit.data.plane_facts import PLANES_FILE, PlaneFacts, planes_beside
from megavit.data.write import DataSet, Split, digest
from megavit.data.write_pairs import (
    SPLITS,
    Pair,
    PairFiles,
    encode_png,
    extension_of,
    left_out,
    notes_of,
    pairs_of_folders,
    read_lines,
    split_folders,
)

NYU_FILE, NYU_SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
_NYU_MAX_M, _KITTI_MAX_M = 10, 80
_KITTI = PlaneFacts(scale=1 / 256, invalid=0, max_m=_KITTI_MAX_M)
_KITTI_LIST = (
    "a text file with a picture a line, relative to the raw data, e.g. "
    "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png"
)


@dataclass(frozen=True)
class Depth:
    """Checks the numbers of a plane of depth."""

    invalid: float | None

    def __call__(self, values: np.ndarray) -> None:
        """ValueError for numbers that no depth is."""
        if values.dtype == np.bool_:
            raise ValueError("it holds true and false, not depth")
        known = np.isfinite(values)
        if self.invalid is not None:
            known &= values != self.invalid
        if (wrong := known & (values < 0)).any():
            raise ValueError(f"it holds {values[wrong][0]}; --invalid says which number means no depth")


def depth_set(root: Path, scale: float | None, invalid: float, max_m: float | None) -> DataSet:
    """`root/[train|val|test/]rgb/*.jpg` and `depth/*.npy` or 16-bit `depth/*.png`, of the same names; metres
    are `scale` (of npy: 1) times the stored numbers. What is not given is that of `root/dense.json`, if there
    is one."""
    if (beside := planes_beside(str(root / PLANES_FILE)).get("depth")) and scale is None:
        scale, invalid = beside.scale, invalid if beside.invalid is None else beside.invalid
        max_m = max_m or beside.max_m
    if (scale is not None and not 0 < scale < float("inf")) or (max_m is not None and not max_m > 0):
        raise ValueError(f"--scale {scale} and --max_m {max_m} must be positive numbers")
    notes, found = {}, {}
    for name, folder in split_folders(root, "rgb").items():
        found[name], notes[name] = pairs_of_folders(root, folder / "rgb", folder / "depth")
    kinds = sorted({extension_of(pair.plane) for pairs in found.values() for pair in pairs})
    if len(kinds) > 1:
        raise ValueError(f"{root} has depth as {' and as '.join(kinds)}, whose units may differ; keep one")
    if scale is None and kinds == ["png"]:
        raise ValueError(
            f"{root} has depth as png: --scale must say how many metres the number 1 is, e.g. 0.001, or "
            f'{root / PLANES_FILE}: {{"depth": {{"scale": 0.001}}}}'
        )
    facts = PlaneFacts(scale=1.0 if scale is None else scale, invalid=invalid, max_m=max_m)
    return _of_files(root, found, facts, notes_of(notes))


def _of_files(root: Path, pairs: dict[str, tuple[Pair, ...]], facts: PlaneFacts, notes: list[str]) -> DataSet:
    check = Depth(facts.invalid)
    splits = [PairFiles(root, "depth", found, check).split(name, facts) for name, found in pairs.items()]
    return DataSet(splits, planes={"depth": facts}, notes=notes)


# NYU Depth v2


def nyu_set(
    root: Path, train_list: Path | None, test_list: Path | None, wanted: Sequence[str] = SPLITS
) -> DataSet:
    """NYU Depth v2: the labeled file (`nyu_depth_v2_labeled.mat` and `splits.mat`, 795 and 654 pictures), or
    folders of `rgb_*.jpg` and `sync_depth_*.png` in millimetres: `sync` or `official_splits/train`, and
    `official_splits/test`. Lists have lines `PICTURE DEPTH [FOCAL]`, relative to such a folder. Only the
    splits that are `wanted` are looked at."""
    if not root.is_dir():
        raise ValueError(f"--root {root} is not a folder")
    folders = _nyu_folders(root)
    if (root / NYU_FILE).exists():
        if train_list or test_list or folders:
            raise ValueError(
                f"{root} holds {NYU_FILE}, and there are folders or lists of the other form, which has more "
                f"pictures; give each form a folder of its own as --root"
            )
        return _nyu_labeled(root, wanted)
    if not folders:
        raise ValueError(f"{root} holds neither {NYU_FILE} nor sync/ nor official_splits/")
    found = {}
    lists = {"train": train_list, "test": test_list}
    for name, listed in ((name, lists[name]) for name in lists if name in wanted):
        if name in folders:
            found[name] = _nyu_listed(root, folders[name], listed) if listed else _nyu(root, folders[name])
        elif listed:
            raise ValueError(f"{root} has no folder for the pictures of {listed}")
    return _of_files(root, found, PlaneFacts(scale=0.001, invalid=0, max_m=_NYU_MAX_M), [])


def _nyu_folders(root: Path) -> dict[str, Path]:
    train = [root / name for name in ("sync", "official_splits/train") if (root / name).is_dir()]
    test = [root / "official_splits/test"] if (root / "official_splits/test").is_dir() else []
    return {name: found[0] for name, found in (("train", train), ("test", test)) if found}


def _nyu(root: Path, folder: Path) -> tuple[Pair, ...]:
    pairs = []
    for image in sorted(folder.rglob("rgb_*.*")):
        if extension_of(image) in IMAGE_EXTENSIONS:
            depth = image.with_name(f"sync_depth_{image.stem.removeprefix('rgb_')}.png")
            if not depth.is_file():
                raise ValueError(f"{image} has no {depth}; add it, or remove the picture")
            pairs.append(Pair(os.path.relpath(image, root), os.path.relpath(depth, root)))
    if not pairs:
        raise ValueError(f"{folder} holds no pictures rgb_*.jpg")
    return tuple(pairs)


def _nyu_listed(root: Path, folder: Path, path: Path) -> tuple[Pair, ...]:
    pairs = []
    for number, line in read_lines(path, "lines PICTURE DEPTH FOCAL"):
        names = [name.lstrip("/") for name in line.split()]
        if len(names) not in (2, 3):
            raise ValueError(f"{path}: line {number} is {line[:80]!r}, not PICTURE DEPTH FOCAL")
        for name in names[:2]:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing, which line {number} of {path} names")
        pairs.append(Pair(*(os.path.relpath(folder / name, root) for name in names[:2])))
    return tuple(pairs)


class _Labeled(NamedTuple):
    """Chosen pictures of NYU's HDF5 file; MATLAB's arrays have their axes in the opposite order there."""

    path: Path
    chosen: tuple[int, ...]

    def load(self, i: int) -> dict[str, bytes]:
        at = self.chosen[i]
        images, depths = _kept_open(self.path)
        try:
            image, depth = images[at], depths[at]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.path}: picture {at + 1} cannot be read: {error}; {_AGAIN}") from error
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(depth.T))
        return {"png": encode_png(np.ascontiguousarray(image.T)), "depth.npy": buffer.getvalue()}


_AGAIN = "download it again"


def _open_labeled(path: Path) -> tuple[Any, Any]:
    """The images, uint8 [n, 3, W, H], and depths, float32 [n, W, H], metres, of the file."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"{path} needs h5py, which is not installed: pip install 'megavit[depth]'"
        ) from error
    try:
        file = h5py.File(path)
        images, depths = file["images"], file["depths"]
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not NYU's labeled file, or cut off: {error}; {_AGAIN}") from error
    count = len(images)
    shapes = (images.shape[:2] + images.shape[2:], (count, 3, *depths.shape[1:]))
    if images.ndim != 4 or depths.ndim != 3 or len(depths) != count or shapes[0] != shapes[1]:
        raise ValueError(
            f"{path}: images of shape {images.shape} with depths of shape {depths.shape} are not NYU's; "
            f"{_AGAIN}"
        )
    if images.dtype != np.uint8 or depths.dtype.kind != "f":
        raise ValueError(f"{path}: images are {images.dtype} and depths {depths.dtype}; {_AGAIN}")
    return images, depths


_kept_open = functools.cache(_open_labeled)  # in each process that reads pictures


def _nyu_labeled(root: Path, wanted: Sequence[str]) -> DataSet:
    path, facts = root / NYU_FILE, PlaneFacts(invalid=0, max_m=_NYU_MAX_M)
    images, _ = _open_labeled(path)
    splits = []
    for name, chosen in _nyu_numbers(root / NYU_SPLITS, len(images)).items():
        if name in wanted:
            part = _Labeled(path, chosen)
            splits.append(Split(name, len(chosen), part.load, digest(path.stat().st_size, chosen, facts)))
    return DataSet(splits, planes={"depth": facts})


def _nyu_numbers(path: Path, count: int) -> dict[str, tuple[int, ...]]:
    """The pictures of each split, from 0."""
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says what is for training; it comes with the labeled file"
        )
    try:
        found = loadmat(str(path))
        numbers = {name: found[f"{name}Ndxs"].ravel().astype(int) - 1 for name in ("train", "test")}
    except Exception as error:  # a damaged file raises whatever it runs into
        raise ValueError(
            f"{path} has no trainNdxs and testNdxs: {type(error).__name__}: {error}; {_AGAIN}"
        ) from error
    both = np.concatenate(list(numbers.values()))
    if len(both) == 0 or both.min() < 0 or both.max() >= count or len(set(both.tolist())) < len(both):
        raise ValueError(f"{path} does not number the {count} pictures from 1, each once; {_AGAIN}")
    return {name: tuple(chosen.tolist()) for name, chosen in numbers.items()}


# KITTI


class _Frame(NamedTuple):
    drive: str  # 2011_09_26_drive_0002_sync
    camera: str  # 02 or 03
    number: str  # 0000000069

    @property
    def image(self) -> str:
        """Relative to the raw data, without extension."""
        return f"{self.drive[:10]}/{self.drive}/image_{self.camera}/data/{self.number}"

    @property
    def depth(self) -> str:
        """Relative to the annotated depth's train or val."""
        return f"{self.drive}/proj_depth/groundtruth/image_{self.camera}/{self.number}.png"


_IMAGE = re.compile(r"(?:.*/)?(\d{4}_\d\d_\d\d_drive_\d{4}_sync)/image_0([23])/data/(\d+)(?:\.png|\.jpg)?")
_NUMBERED = re.compile(r"(?:.*/)?(\d{4}_\d\d_\d\d_drive_\d{4}_sync) (\d+) ([lr])")


def kitti_set(
    root: Path,
    depth_root: Path | None,
    train_list: Path | None,
    test_list: Path | None,
    wanted: Sequence[str] = SPLITS,
) -> DataSet:
    """KITTI: raw pictures `DATE/DRIVE_sync/image_02/data/*.png` below `root`, and annotated depth
    `{train,val}/DRIVE_sync/proj_depth/groundtruth/image_02/*.png` below `depth_root` (or
    `root/data_depth_annotated`, or `root`). Lists such as Eigen's choose pictures; without them the left
    camera's are taken, by the annotated depth's own train and val, those that are `wanted`."""
    annotated = root / "data_depth_annotated"
    depth_root = depth_root or (annotated if annotated.is_dir() else root)
    for option, folder in (("--root", root), ("--depth_root", depth_root)):
        if not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder")
    if train_list or test_list:
        lists = {name: path for name, path in (("train", train_list), ("test", test_list)) if path}
        found = {name: _kitti_listed(root, depth_root, path) for name, path in lists.items()}
    else:
        found = {name: _kitti(root, depth_root, name) for name in ("train", "val") if name in wanted}
        found = {name: (pairs, note) for name, (pairs, note) in found.items() if pairs}
        if not found:
            raise ValueError(
                f"no picture of raw data in {root} has depth in {depth_root}; it must hold "
                f"{{train,val}}/DRIVE_sync/proj_depth/groundtruth/image_02/*.png (--depth_root)"
            )
    notes = notes_of({name: note for name, (_, note) in found.items()})
    return _of_files(root, {name: pairs for name, (pairs, _) in found.items()}, _KITTI, notes)


def _kitti(root: Path, depth_root: Path, part: str) -> tuple[tuple[Pair, ...], str]:
    pairs, missing = [], []
    for path in sorted((depth_root / part).glob("*_sync/proj_depth/groundtruth/image_02/*.png")):
        frame = _Frame(path.parts[-5], "02", path.stem)
        image = _kitti_image(root, frame)
        if image:
            pairs.append(Pair(image, os.path.relpath(path, root)))
        else:
            missing.append(os.path.relpath(path, depth_root))
    return tuple(pairs), left_out(missing, "whose picture is not in the raw data")


def _kitti_listed(root: Path, depth_root: Path, path: Path) -> tuple[tuple[Pair, ...], str]:
    pairs, missing = [], []
    for number, line in read_lines(path, _KITTI_LIST):
        match = _IMAGE.fullmatch(line.split()[0]) or _NUMBERED.fullmatch(" ".join(line.split()))
        if not match:
            raise ValueError(f"{path}: line {number} is {line[:80]!r}; the file must be {_KITTI_LIST}")
        drive, *rest = match.groups()
        if match.re is _IMAGE:
            frame = _Frame(drive, f"0{rest[0]}", rest[1])
        else:
            frame = _Frame(drive, {"l": "02", "r": "03"}[rest[1]], f"{int(rest[0]):010}")
        image = _kitti_image(root, frame)
        if not image:
            raise ValueError(
                f"{root / frame.image}.png is missing, which line {number} of {path} names; download its "
                f"drive's synced raw data, or remove the line"
            )
        depth = [depth_root / part / frame.depth for part in ("train", "val", ".")]
        depth = [place for place in depth if place.is_file()]
        if depth:
            pairs.append(Pair(image, os.path.relpath(depth[0], root)))
        else:
            missing.append(image)
    if not pairs:
        raise ValueError(f"no picture of {path} has annotated depth below {depth_root} (--depth_root)")
    return tuple(pairs), left_out(missing, "without annotated depth")


def _kitti_image(root: Path, frame: _Frame) -> str | None:
    """Many keep the pictures as JPEG, a tenth of the size."""
    names: Sequence[str] = [f"{frame.image}.{extension}" for extension in ("png", "jpg")]
    return next((name for name in names if (root / name).is_file()), None)
