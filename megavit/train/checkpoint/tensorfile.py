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
_FLUSH_BYTES = 1 << 30  # so much at most waits in memory for a slow disk, out of sight of the progress
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_TYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


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
    of bytes of each piece written; the file is flushed every GiB, so that a disk which is slower than memory
    shows as slow progress and not as one long wait at the end. Raises OSError as the file system does (disk
    full).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.num_bytes
        header[name] = {"dtype": entry.type, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prologue = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    size, checksum, flushed = 0, 0, 0
    with open(path, "wb", buffering=0) as file:
        for array in itertools.chain([prologue], data):
            view = np.ascontiguousarray(array).data.cast("B")
            for at in range(0, len(view), _CHUNK):
                piece = view[at : at + _CHUNK]
                checksum = crc32(piece, checksum)
                size += len(piece)
                moved = len(piece)
                while piece:  # a write may be short, just before a disk is full for instance
                    piece = piece[file.write(piece) :]
                if size // _FLUSH_BYTES > flushed:
                    os.fsync(file.fileno())
                    flushed = size // _FLUSH_BYTES
                if progress:
                    progress(moved)
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
    """A safetensors file mapped into memory: reading a part of a tensor reads just the pages it lies on.

    `entries` are the tensors that it holds. The header is checked first: ValueError, naming the file, unless
    its entries are of known types and fill the file exactly, one after the other.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"{path} is damaged: a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length)
        try:
            header = json.loads(text)
            if type(header) is not dict:
                raise ValueError("its header is no JSON object")
            header.pop("__metadata__", None)
            placed = {name: _placed_entry(name, item) for name, item in header.items()}
            _check_filled(placed, size - 8 - length)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self.entries = {name: entry for name, (entry, _) in placed.items()}
        self._starts = {name: 8 + length + start for name, (_, start) in placed.items()}
        self._content = np.memmap(path, np.uint8, "r", offset=0)

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, not copied."""
        entry, first = self.entries[name], self._starts[name]
        content = self._content[first : first + entry.num_bytes]
        return content.view(_TYPES[entry.type]).reshape(entry.shape)


def _placed_entry(name: str, item: Any) -> tuple[Entry, int]:
    """An entry as the header describes it, and where its content begins."""
    found: dict[str, Any] = item if type(item) is dict else {}
    type_, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if type(type_) is not str or type_ not in _TYPES:
        raise ValueError(f"{name} has the type {type_!r:.60}; known are {', '.join(_TYPES)}")
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {shape!r:.60}")
    entry = Entry(type_, tuple(shape))
    if type(offsets) is not list or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"{name} has the data_offsets {offsets!r:.60}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != entry.num_bytes:
        raise ValueError(f"{name} of {entry.num_bytes:,} bytes lies at {offsets!r:.60}")
    return entry, offsets[0]


def _check_filled(placed: Mapping[str, tuple[Entry, int]], size: int) -> None:
    """ValueError unless the entries lie one after the other and fill `size` bytes."""
    end = 0
    for name, (entry, start) in sorted(placed.items(), key=lambda item: (item[1][1], item[1][0].num_bytes)):
        if start != end:
            raise ValueError(f"{name} begins at byte {start:,} of its data, not at {end:,}")
        end += entry.num_bytes
    if end != size:
        raise ValueError(f"its entries end at byte {end:,} of its {size:,} bytes of data")
