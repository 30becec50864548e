"""Writing WebDataset shards, and the data sets with a class a sample in their own on-disk formats: digits,
CIFAR-10/100, folders of images or videos. Those with depth and masks are in write_depth.py and
write_masks.py.

A shard appears under its name only when it is complete, and one that exists is not written again, so a run
that was interrupted is continued by running it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from megavit.data.index import IMAGE_EXTENSIONS, INDEX_SUFFIX, SOURCE_EXTENSION, VIDEO_EXTENSIONS
from megavit.data.json_data import parse_json
from megavit.data.manifest import MANIFEST_SUFFIX, open_shards, write_index
from megavit.data.plane_facts import PlaneFacts

DIGITS_TRAIN = 1437  # of load_digits' 1,797 images; the last 360 come from other writers


@dataclass(frozen=True)
class Split:
    """A named sequence of samples; `load(i)` gives a sample's members by extension and is thread-safe.
    `left_out` are files of the data set that no sample is made of."""

    name: str
    size: int
    load: Callable[[int], dict[str, bytes]]
    fingerprint: str
    left_out: tuple[str, ...] = ()

    def note_left_out(self) -> str:
        """A line about the files that were left out, by extension, or '' if there are none."""
        return f"note: {self.name}: left out {_by_extension(self.left_out)}" if self.left_out else ""


@dataclass(frozen=True)
class DataSet:
    """What is written: splits, the names of the classes where there are any, what the planes of a sample
    mean, lines for the user, and what finds the results of simple methods (`baselines.json`)."""

    splits: Sequence[Split]
    class_names: Sequence[str] = ()
    planes: Mapping[str, PlaneFacts] = field(default_factory=dict)
    notes: Sequence[str] = ()
    baselines: Callable[[], dict[str, Any]] | None = None


def digest(*parts: object) -> str:
    """A short hash that names the content of a split, so that other data are not taken for it."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def write_splits(splits: Sequence[Split], out: str | Path, shard_size: int, workers: int) -> list[Path]:
    """Write each split as `out/<name>-<number>.tar` of `shard_size` samples, `workers` shards at a time, each
    with its index, and `out/<name>.manifest.json`.

    Returns the shard paths in order. Finished shards of the same content are kept; ValueError if `out` holds
    shards of other content or another shard size.
    """
    if shard_size < 1 or workers < 1:
        raise ValueError(f"--shard_size {shard_size} and --workers {workers} must be at least 1")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder --out {out} cannot be made: {error.strerror}") from error
    paths: list[Path] = []
    jobs = []
    for split in splits:
        _claim(out, split, shard_size)
        count = -(-split.size // shard_size)
        for number in range(count):
            path = out / f"{split.name}-{number:06d}.tar"
            paths.append(path)
            if not path.exists() or not Path(f"{path}{INDEX_SUFFIX}").exists():
                jobs.append((split, path, number * shard_size, min(split.size, (number + 1) * shard_size)))
    with tqdm(total=len(paths), initial=len(paths) - len(jobs), desc=f"shards in {out}", unit="shard") as bar:
        # Threads: encoding and file reads release the interpreter lock, and arrays need not travel to
        # processes.
        pool = ThreadPoolExecutor(workers)
        try:
            for _ in pool.map(lambda job: _write_shard(*job), jobs):
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    for split in splits:
        numbers = f"{{000000..{-(-split.size // shard_size) - 1:06d}}}"
        open_shards(f"{out}/{split.name}-{numbers}.tar").save(out / f"{split.name}{MANIFEST_SUFFIX}")
    return paths


def _claim(out: Path, split: Split, shard_size: int) -> None:
    record = out / f"{split.name}.json"
    content = {"samples": split.size, "shard_size": shard_size, "fingerprint": split.fingerprint}
    if record.exists():
        try:
            found = parse_json(record.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{record} cannot be read: {error}; choose another --out or delete it"
            ) from error
        if found != content:
            raise ValueError(
                f"{record} describes other data or another shard size; choose another --out or delete it"
            )
    elif any(out.glob(f"{split.name}-*.tar")):
        raise ValueError(f"{out} already holds {split.name} shards of unknown content; choose another --out")
    else:
        record.write_text(json.dumps(content) + "\n")


def _write_shard(split: Split, path: Path, start: int, stop: int) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # A whole-second time: webdataset's default, a fraction, costs three extra blocks a member.
        with open(partial, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for i in range(start, stop):
                tar.write({"__key__": f"{split.name}_{i:09d}", **split.load(i)})
        write_index(partial, f"{path}{INDEX_SUFFIX}", name=str(path))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class ArrayImages:
    """Images [n, S, S] or [n, S, S, 3] uint8 and class ids [n], stored as PNG."""

    images: np.ndarray
    labels: np.ndarray

    def __call__(self, i: int) -> dict[str, bytes]:
        buffer = io.BytesIO()
        Image.fromarray(self.images[i]).save(buffer, "PNG")
        return {"png": buffer.getvalue(), "cls": str(self.labels[i]).encode()}

    def split(self, name: str) -> Split:
        content = hashlib.blake2b(self.images.tobytes() + self.labels.tobytes(), digest_size=8).hexdigest()
        return Split(name, len(self.labels), self, content)


@dataclass(frozen=True)
class Files:
    """Image files, relative to `root`, and class ids; the bytes are stored as they are, beside the path."""

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __call__(self, i: int) -> dict[str, bytes]:
        path = self.root / self.paths[i]
        extension = path.suffix[1:].lower()
        label = str(self.labels[i]).encode()
        return {extension: path.read_bytes(), "cls": label, SOURCE_EXTENSION: os.fsencode(self.paths[i])}


def digits_arrays() -> tuple[ArrayImages, ArrayImages]:
    """scikit-learn's load_digits, 8x8 grey scaled to 0..255: the first 1,437 for training, the last 360 for
    test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    return (
        ArrayImages(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]),
        ArrayImages(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
    )


def digits_baselines() -> dict[str, Any]:
    """Test accuracy of three classic classifiers on the digits' pixels, same split as `digits_splits` (2
    seconds).

    Pixels scaled to 0..16 and the SVC's gamma 0.001 are those of scikit-learn's own digits example.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    train, test = (
        ArrayImages(part.images.reshape(len(part.labels), -1) * (16 / 255), part.labels)
        for part in digits_arrays()
    )
    models = {
        "logistic regression": LogisticRegression(max_iter=5000),
        "1-nearest neighbour": KNeighborsClassifier(1),
        "SVC, RBF kernel": SVC(gamma=0.001),
    }
    results = {
        name: float(model.fit(train.images, train.labels).score(test.images, test.labels))
        for name, model in models.items()
    }
    return {"split": "test", "metric": "top1", "results": results}


def digits_splits(holdout: int = 0) -> list[Split]:
    """Train and test; with `holdout`, the last so many training images become the split 'val' for choosing
    settings."""
    train, test = digits_arrays()
    if not holdout:
        return [train.split("train"), test.split("test")]
    if not 0 < holdout < DIGITS_TRAIN:
        raise ValueError(f"--holdout must lie in 1..{DIGITS_TRAIN - 1}, got {holdout}")
    cut = DIGITS_TRAIN - holdout
    kept = ArrayImages(train.images[:cut], train.labels[:cut])
    held = ArrayImages(train.images[cut:], train.labels[cut:])
    return [kept.split("train"), held.split("val"), test.split("test")]


def cifar_splits(root: str | Path, num_classes: int) -> list[Split]:
    """CIFAR-10 or -100 from the python pickles (`cifar-10-batches-py`, `cifar-100-python`); fine labels for
    100.

    `root` is that folder or its parent. Raises ValueError naming the file that is missing or malformed.
    """
    return [cifar_arrays(root, num_classes, split).split(split) for split in ("train", "test")]


def cifar_arrays(root: str | Path, num_classes: int, split: str) -> ArrayImages:
    """The images of "train" or "test"; errors as of `cifar_splits`."""
    key = b"labels" if num_classes == 10 else b"fine_labels"
    return _cifar_arrays(_cifar_folder(root, num_classes), cifar_files(num_classes, split), key, num_classes)


def cifar_files(num_classes: int, split: str) -> list[str]:
    """The names of the pickles with the images of "train" or "test"."""
    if num_classes == 10:
        return [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return [split]


def cifar_class_names(root: str | Path, num_classes: int) -> list[str]:
    """The classes' names in the order of their ids, from the data set's `batches.meta` or `meta`. ValueError
    if that file is missing or holds something else."""
    name, key = ("batches.meta", b"label_names") if num_classes == 10 else ("meta", b"fine_label_names")
    path = _cifar_folder(root, num_classes) / name
    labels = _read_cifar(path, key)[key]
    if not isinstance(labels, list) or not all(isinstance(label, bytes) for label in labels):
        raise ValueError(f"{path} is not a CIFAR file: {key.decode()} is no list of names")
    return [label.decode("utf-8", "surrogateescape") for label in labels]


def _cifar_folder(root: str | Path, num_classes: int) -> Path:
    folder = Path(root) / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    return folder if folder.is_dir() else Path(root)


def _cifar_arrays(root: Path, files: Iterable[str], label_key: bytes, num_classes: int) -> ArrayImages:
    images, labels = [], []
    for name in files:
        path = root / name
        batch = _read_cifar(path, b"data", label_key)
        try:
            pixels, found = np.asarray(batch[b"data"], np.uint8), np.asarray(batch[label_key], np.int64)
        except Exception as error:  # a damaged pickle raises whatever it runs into
            raise ValueError(f"{path} is not a CIFAR file: {error}") from error
        if pixels.ndim != 2 or pixels.shape[1] != 3072 or found.shape != (len(pixels),):
            raise ValueError(
                f"{path}: data of shape {pixels.shape} with labels of shape {found.shape} is not CIFAR"
            )
        if len(found) and not 0 <= found.min() <= found.max() < num_classes:
            raise ValueError(
                f"{path}: labels {found.min()} to {found.max()} are not those of CIFAR-{num_classes}"
            )
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(found)
    return ArrayImages(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels))


def _read_cifar(path: Path, *keys: bytes) -> dict[bytes, Any]:
    """A CIFAR pickle, which must have `keys`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; --root must hold the 'python version' of CIFAR, extracted")
    try:
        with open(path, "rb") as file:
            found = _CifarUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise ValueError(f"{path} is not a CIFAR file: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise ValueError(f"{path} is not a CIFAR file with {' and '.join(key.decode() for key in keys)}")
    return found


class _CifarUnpickler(pickle.Unpickler):
    """Allows numpy arrays and bytes only: a pickle from the network may otherwise run any code."""

    _ARRAYS = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> object:
        is_array = module.split(".")[0] == "numpy" and name in self._ARRAYS
        if is_array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it may hold arrays only, not {module}.{name}")


def folder_splits(root: str | Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[Split]:
    """Folders of images (or other files), one a class: `root/<class>/...`, or
    `root/{train,val,test}/<class>/...`.

    Class ids are the sorted class names of the training split (of the root without splits), and are written
    to `classes.txt` by the caller. Raises ValueError for no such files, or a split with classes that training
    lacks.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--root {root} is not a folder")
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()] or ["."]
    classes = class_names(root)
    splits = []
    for name in names:
        folder = root / name
        extra = sorted({d.name for d in folder.iterdir() if d.is_dir()} - set(classes))
        if extra:
            raise ValueError(f"{folder} has classes that the training split lacks: {', '.join(extra[:5])}")
        paths, labels = [], []
        left_out = [os.path.relpath(path, root) for path in sorted(folder.iterdir()) if path.is_file()]
        for label, class_name in enumerate(classes):
            for path in sorted((folder / class_name).rglob("*")):
                if path.suffix[1:].lower() in extensions:
                    paths.append(os.path.relpath(path, root))
                    labels.append(label)
                elif path.is_file():
                    left_out.append(os.path.relpath(path, root))
        if not paths:
            found = f"; there are {_by_extension(left_out)}" if left_out else ""
            kind = "images" if extensions is IMAGE_EXTENSIONS else "files"
            raise ValueError(f"{folder} holds no {kind} ({', '.join(extensions)}) in class folders{found}")
        # Neighbours of one class would fill whole shards: spread the classes over the shards.
        order = np.argsort(
            [hashlib.blake2b(os.fsencode(os.path.basename(p)), digest_size=8).digest() for p in paths]
        )
        files = Files(root, tuple(paths[i] for i in order), tuple(labels[i] for i in order))
        sizes = [os.path.getsize(root / path) for path in files.paths]
        fingerprint = digest(list(files.paths), sizes, classes)
        split_name = "train" if name == "." else name
        splits.append(Split(split_name, len(paths), files, fingerprint, tuple(left_out)))
    return splits


def _by_extension(paths: Sequence[str], most: int = 3) -> str:
    """Files as text: how many there are of each extension, the commonest first, and the first names."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        kind = os.path.splitext(path)[1].lower() or "without extension"
        if kind[1:] in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS):
            kind = "outside the class folders"
        groups.setdefault(kind, []).append(path)
    return "; ".join(
        f"{len(names):,} {kind} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
        for kind, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    )


def class_names(root: str | Path) -> list[str]:
    """Sorted class folder names of the training split; the index is the class id."""
    root = Path(root)
    folder = root / "train" if (root / "train").is_dir() else root
    return sorted(d.name for d in folder.iterdir() if d.is_dir())
