"""Safetensors files, written as a stream with the checksum of every byte, and read in place.

The format is safetensors' own (8 bytes of header length, a JSON header, raw little-endian data), so its
library opens these files. It cannot write one tensor after the other, though, and would need a rank's share,
or an exported model, in memory twice.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from tqdm import tqdm

_CHUNK = 1 << 24  # bytes: large enough for parallel file systems, small enough for a progress line
_TYPES = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


class Entry(NamedTuple):
    """One tensor of a file: its type (`F32` or `U8`) and shape."""

    type: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _TYPES[self.type].itemsize


class Written(NamedTuple):
    """Size of a finished file, and the CRC32 of its content."""

    bytes: int
    crc32: int


def write_tensors(
    path: Path,
    entries: Mapping[str, Entry],
    data: Iterable[np.ndarray],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write a safetensors file and flush it to the disk.

    `data` yields the entries' contents in their order, in arrays cut anywhere. `progress` is told the number
    of bytes of each piece written. Raises OSError as the file system does (disk full).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.num_bytes
        header[name] = {"dtype": entry.type, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prologue = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    size, checksum = 0, 0
    with open(path, "wb", buffering=0) as file:
        for array in itertools.chain([prologue], data):
            view = memoryview(np.ascontiguousarray(array)).cast("B")
            for at in range(0, len(view), _CHUNK):
                piece = view[at : at + _CHUNK]
                checksum = crc32(piece, checksum)
                size += len(piece)
                if progress:
                    progress(len(piece))
                while piece:  # a write may be short, just before a disk is full for instance
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    assert size == len(prologue) + end, (size, len(prologue), end)
    return Written(size, checksum)


def checksum_of(path: Path, progress: Callable[[int], None] | None = None) -> Written:
    """Size and CRC32 of a file as it is now; reads every byte."""
    size, checksum = 0, 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_CHUNK):
            checksum = crc32(piece, checksum)
            size += len(piece)
            if progress:
                progress(len(piece))
    return Written(size, checksum)


def progress_bar(num_bytes: int, title: str) -> tqdm[Any]:
    """For what takes more than a moment, on a terminal; `update` it with bytes."""
    hide = True if num_bytes < 1 << 30 else None
    return tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=hide)


class TensorFile:
    """A safetensors file mapped into memory: reading a part of a tensor reads just the pages it lies on."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
        self._content = np.memmap(path, np.uint8, "r", offset=0)
        self._start = 8 + length

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, not copied."""
        entry = self._header[name]
        first, last = (self._start + offset for offset in entry["data_offsets"])
        return self._content[first:last].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
