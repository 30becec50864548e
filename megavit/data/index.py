"""Where every sample lies inside its tar shard: one walk over the headers, then reading by offset.

A shard is a plain WebDataset tar: members `KEY.EXT` grouped by key. Python's tarfile and webdataset take a
damaged header for the end of the archive and silently drop the rest; the walk here raises instead.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import braceexpand
import numpy as np
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "cls"
_BLOCK = tarfile.BLOCKSIZE
_MANY_SHARDS = 200  # from here on indexing takes long enough for a progress bar


class ShardError(ValueError):
    """A shard is missing, damaged or not a WebDataset; the message names it."""


@dataclass(frozen=True)
class ShardIndex:
    """One shard: `keys[i]`, and offset and size in bytes of its image and label, int64 [n, 2]."""

    path: str
    keys: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def expand_shards(pattern: str) -> list[str]:
    """Paths of a pattern with braces (`{000..009}`) and wildcards (`*`), sorted. ShardError if one does not
    exist."""
    paths: list[str] = []
    for part in braceexpand.braceexpand(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        paths.extend(path for path in found if os.path.isfile(path))
        if not any(os.path.isfile(path) for path in found):
            raise ShardError(
                f"shard {part} does not exist (from {pattern!r}); write it with launch/shards.py"
            )
    return paths


def index_shards(pattern: str, *, progress: bool = False) -> list[ShardIndex]:
    """Index every shard of `pattern`, in parallel. ShardError for a missing, damaged or empty one."""
    paths = expand_shards(pattern)
    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        shards = pool.map(index_shard, paths)
        show = progress and len(paths) >= _MANY_SHARDS
        return list(tqdm(shards, f"index {pattern}", len(paths), unit="shard", disable=not show))


def index_shard(path: str | Path) -> ShardIndex:
    """Walk one tar's headers (USTAR, PAX and GNU long names). Raises ShardError for damage, with the byte
    offset."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in walk_tar(path):
        key, extension = base_plus_ext(name)
        if key is None or Path(name).name.startswith("."):
            continue
        members = samples.setdefault(key, {})
        if extension.lower() in members:
            raise ShardError(
                f"shard {path}: {name!r} appears twice (again at byte {offset}); keys must be unique"
            )
        members[extension.lower()] = (offset, size)
    images, labels = [], []
    for key, members in samples.items():
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is None or LABEL_EXTENSION not in members:
            raise ShardError(
                f"shard {path}: sample {key!r} has {sorted(members)}; it needs an image "
                f"({', '.join(IMAGE_EXTENSIONS)}) and a label ({LABEL_EXTENSION})"
            )
        images.append(image)
        labels.append(members[LABEL_EXTENSION])
    if not samples:
        raise ShardError(f"shard {path} holds no samples")
    return ShardIndex(str(path), tuple(samples), np.array(images, np.int64), np.array(labels, np.int64))


def walk_tar(path: str | Path) -> list[tuple[str, int, int]]:
    """(name, data offset, size) of each regular file in a tar. Raises ShardError where tarfile would stop in
    silence."""
    members: list[tuple[str, int, int]] = []
    size_on_disk = os.path.getsize(path)
    overrides: dict[str, str] = {}
    with open(path, "rb", buffering=_BLOCK) as file:
        offset = 0
        while True:
            file.seek(offset)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                _check_end(path, file, offset)
                return members
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise ShardError(f"shard {path} is damaged or truncated: {error} at byte {offset}") from error
            data, offset = offset + _BLOCK, offset + _BLOCK + -(-info.size // _BLOCK) * _BLOCK
            if data + info.size > size_on_disk:
                raise ShardError(
                    f"shard {path} is truncated: {info.name!r} ends past its {size_on_disk} bytes"
                )
            if info.type == tarfile.GNUTYPE_LONGNAME:
                overrides["path"] = file.read(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                overrides.update(_pax_records(file.read(info.size)))
            elif info.type != tarfile.XGLTYPE:
                if info.isreg():
                    members.append(
                        (overrides.get("path", info.name), data, int(overrides.get("size", info.size)))
                    )
                overrides = {}


def _check_end(path: str | Path, file: BinaryIO, offset: int) -> None:
    """A zero block ends the archive: anything but zeros behind it is a header that was overwritten."""
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise ShardError(
                f"shard {path} is damaged: zeros instead of a header at byte {offset}, data behind them"
            )


def _pax_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records of a PAX extended header."""
    records = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


class ShardReader:
    """Reads samples by (shard, index) with one `pread` a member; keeps the most recently used files open."""

    def __init__(self, shards: Sequence[ShardIndex], max_open: int = 64):
        self.shards = shards
        self._max_open = max_open
        self._files: dict[int, int] = {}

    def read(self, shard: int, index: int) -> tuple[bytes, bytes]:
        """(image bytes, label bytes). Raises ShardError if the file has become shorter than its index."""
        entry = self.shards[shard]
        file = self._open(shard)
        parts = []
        for offset, size in (entry.images[index], entry.labels[index]):
            data = os.pread(file, int(size), int(offset))
            if len(data) != size:
                raise ShardError(
                    f"shard {entry.path}: sample {entry.keys[index]!r} is cut off at byte {offset}"
                )
            parts.append(data)
        return parts[0], parts[1]

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # most recent last
            return self._files[shard]
        if len(self._files) >= self._max_open:
            os.close(self._files.pop(next(iter(self._files))))
        self._files[shard] = os.open(self.shards[shard].path, os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}  # descriptors do not travel to worker processes
