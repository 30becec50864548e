"""Pictures that have a dense plane of the same size beside them, as files: what the writers of depth and of
masks share."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megavit.data.exif import orientation, upright_size
from megavit.data.images import DecodeError, open_image
from megavit.data.index import IMAGE_EXTENSIONS, SOURCE_EXTENSION
from megavit.data.plane_facts import PlaneFacts
from megavit.data.planes import PLANE_KINDS, read_plane
from megavit.data.write import Split, digest

SPLITS = ("train", "val", "test")
_LARGEST = 1 << 31  # pixels of a picture or plane; training has a limit of its own


@dataclass(frozen=True)
class Pair:
    """A picture and its plane, relative to the folder of the data set."""

    image: str
    plane: str


@dataclass(frozen=True)
class PairFiles:
    """Loads pairs of files as the members of samples: the picture as it is, and the plane called `name`.

    `check(values)` gets the plane's numbers [H, W, 1]. It raises ValueError, saying what is wrong with them,
    or returns others to be stored in their place, uint8, or None to keep the file as it is.
    """

    root: Path
    name: str
    pairs: tuple[Pair, ...]
    check: Callable[[np.ndarray], np.ndarray | None]

    def __call__(self, i: int) -> dict[str, bytes]:
        pair = self.pairs[i]
        image_path, plane_path = self.root / pair.image, self.root / pair.plane
        image, plane = image_path.read_bytes(), plane_path.read_bytes()
        kind = extension_of(plane_path)
        try:
            size = upright_size(*open_image(image, _LARGEST).size, orientation(image))
        except DecodeError as error:
            raise ValueError(f"{image_path} is no picture: {error}; {_FIX}") from error

        def check_size(width: int, height: int) -> None:
            if (width, height) != size:
                raise ValueError(f"it has {width}x{height} pixels, but {image_path} {size[0]}x{size[1]}")

        try:
            values = read_plane(plane, kind, check_size)
            if values.shape[2] != 1:
                raise ValueError(f"it has {values.shape[2]} channels, not one number a pixel")
            stored = self.check(values)
        except ValueError as error:
            raise ValueError(f"{plane_path} cannot be used: {error}; {_FIX}") from error
        return {
            extension_of(image_path): image,
            f"{self.name}.{kind}": plane if stored is None else encode_png(stored[:, :, 0]),
            SOURCE_EXTENSION: os.fsencode(pair.image),
        }

    def split(self, name: str, facts: PlaneFacts) -> Split:
        """The pairs in an order that spreads neighbours, which are often alike, over the shards."""
        order = sorted(self.pairs, key=lambda pair: hashlib.blake2b(os.fsencode(pair.image)).digest())
        files = PairFiles(self.root, self.name, tuple(order), self.check)
        sizes = [os.path.getsize(self.root / path) for pair in order for path in (pair.image, pair.plane)]
        return Split(name, len(order), files, digest([(p.image, p.plane) for p in order], sizes, facts))


_FIX = "repair it, or remove the picture and its plane"


def extension_of(path: str | Path) -> str:
    """As members are called: lower case, without the dot."""
    return os.path.splitext(path)[1][1:].lower()


def encode_png(values: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3] as PNG, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def split_folders(root: Path, needed: str) -> dict[str, Path]:
    """The folders of the splits by name: those of `root/{train,val,test}` that hold a folder `needed`, or
    `root` itself as train. ValueError if there is none."""
    if not root.is_dir():
        raise ValueError(f"--root {root} is not a folder")
    found = {name: root / name for name in SPLITS if (root / name / needed).is_dir()}
    if not found and not (root / needed).is_dir():
        raise ValueError(f"{root} has no folder {needed}, nor have {', '.join(SPLITS)} in it")
    return found or {"train": root}


def files_by_stem(folder: Path, extensions: Sequence[str]) -> dict[str, Path]:
    """The files below `folder` by their path in it without extension, ascending. ValueError for two of one
    name, and if there are none."""
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} is missing")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if extension_of(path) in extensions and path.is_file():
            stem = os.path.splitext(os.path.relpath(path, folder))[0]
            if stem in found:
                raise ValueError(f"{found[stem]} and {path} have the same name; remove one of them")
            found[stem] = path
    if not found:
        raise ValueError(f"{folder} holds no files of the kinds {', '.join(extensions)}")
    return found


def pairs_of_folders(
    root: Path, images: Path, planes: Path, kinds: Sequence[str] = PLANE_KINDS
) -> tuple[tuple[Pair, ...], str]:
    """The pictures below `images` with the planes of the same names below `planes`, and a note about planes
    that have no picture, or ''. ValueError for a picture without a plane."""
    pictures, found = files_by_stem(images, IMAGE_EXTENSIONS), files_by_stem(planes, kinds)
    if missing := [stem for stem in pictures if stem not in found]:
        expected = " or ".join(f"{planes / missing[0]}.{kind}" for kind in kinds)
        raise ValueError(
            f"{pictures[missing[0]]} has no {expected} ({len(missing):,} of {len(pictures):,} pictures have "
            f"none); add it, or remove the picture"
        )
    rest = [found[stem] for stem in found if stem not in pictures]
    pairs = (Pair(os.path.relpath(pictures[s], root), os.path.relpath(found[s], root)) for s in pictures)
    return tuple(pairs), left_out(rest, "without a picture")


def left_out(paths: Sequence[str | Path], why: str, most: int = 3) -> str:
    """A note about files that no sample is made of, with the first names; '' if there are none."""
    if not paths:
        return ""
    names = ", ".join(str(path) for path in paths[:most])
    return f"left out {len(paths):,} {why} ({names}{', ...' if len(paths) > most else ''})"


def notes_of(notes: Mapping[str, str]) -> list[str]:
    """Notes of splits as lines."""
    return [f"note: {split}: {note}" for split, note in notes.items() if note]


def read_lines(path: Path, what: str) -> Iterable[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers, from 1. ValueError if it is none, or
    has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"{path} cannot be read: {reason}; it must be {what}") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} is empty; it must be {what}")
    return found
