"""What a frozen trunk makes of each training picture, on disk: computed in the first epoch, then only read.

A folder has one file of rows, one row for each sample of the shards, in their order, and `key.json`, which
says what the rows are. A row ends with two checksums: of its values, and of whose values they are. One that
was never written, that a kill has torn, or that is another's does not count and is computed again. So ranks
need no locks, and a run that goes on in another layout, or another run with the same trunk, finds what is
there.

Letters: b micro-batch, T taps, D width of the trunk, h and w the sides of its grid.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from megavit.parallel.mesh import Mesh

ROWS_FILE, KEY_FILE = "features.bin", "key.json"
_FORMAT = 1
_PAGE = 4096  # rows begin at pages, so that hosts that write neighbouring ones do not share one
_TRAILER = 8
_DISK_SHARE = 0.98  # of the free space that may be filled


def row_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a row takes in the file."""
    return -(-(math.prod(shape) * dtype.itemsize + _TRAILER) // _PAGE) * _PAGE


def check_space(folder: Path, num_samples: int, shape: Sequence[int], dtype: torch.dtype, limit: int) -> None:
    """ValueError unless the rows of so many samples may take the disk space that they need, of which what is
    there already counts as taken."""
    needed = num_samples * row_bytes(shape, dtype)
    what = (
        f"task.cache_features needs {_size(needed)} for {num_samples:,} samples ({shape[0]} maps of "
        f"{shape[1]} x {shape[2]} x {shape[3]} in {str(dtype).removeprefix('torch.')})"
    )
    if needed > limit:
        raise ValueError(
            f"{what}, more than --task.cache_gb {limit / 1e9:g} allows; raise it, name fewer --task.layers, "
            f"or leave the cache out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = (folder / ROWS_FILE).stat().st_blocks * 512 if (folder / ROWS_FILE).exists() else 0
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"task.cache_features {folder} cannot be used: {error.strerror}") from error
    if needed - there > free * _DISK_SHARE:
        raise ValueError(f"{what}, but {folder} has {_size(free)} left; name another folder")


class FeatureCache:
    """The rows [T, D, h, w] of `num_samples` samples in `folder`, as `key` tells them from others.

    Collective over the world, as is `read`. Raises ValueError, naming what differs, if the folder holds
    others.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        num_samples: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        mesh: Mesh,
    ):
        self.shape, self.dtype, self.mesh = tuple(shape), dtype, mesh
        self._values = math.prod(shape) * dtype.itemsize
        self._stride = row_bytes(shape, dtype)
        fields = {**key, "format": _FORMAT, "samples": num_samples, "shape": list(shape), "dtype": str(dtype)}
        text = json.dumps(fields, indent=2, sort_keys=True)
        self._key = crc32(text.encode())
        path = folder / ROWS_FILE
        mesh.on_main(lambda: _claim(folder, text, num_samples * self._stride))
        if mesh.any(not path.is_file()):
            raise ValueError(f"some ranks do not see {path}: name a folder that all hosts share")
        self._file = path.open("r+b", buffering=0)

    def read(self, numbers: Tensor, usable: Tensor) -> list[Tensor] | None:
        """The T maps [b, D, h, w] of the samples `numbers` [b], 0 for those that are not `usable` [b], or
        None if any rank lacks one of its own."""
        buffer = torch.zeros(len(numbers), self._stride, dtype=torch.uint8)
        wanted = zip(buffer, numbers.tolist(), usable.tolist(), strict=True)
        found = all(self._read_row(row, number) for row, number, is_usable in wanted if is_usable)
        if self.mesh.any(not found):
            return None
        values = buffer[:, : self._values].contiguous().view(self.dtype).view(-1, *self.shape)
        return list(values.to(self.mesh.device).unbind(1))

    def write(self, numbers: Tensor, usable: Tensor, maps: Sequence[Tensor]) -> None:
        """Keep the T maps [b, D, h, w] of those samples that are usable. The ranks of a TP group all have
        them; the first one writes."""
        if self.mesh.tp_rank:
            return
        for at, (number, is_usable) in enumerate(zip(numbers.tolist(), usable.tolist(), strict=True)):
            if not is_usable:  # its picture may be there the next time
                continue
            row = torch.stack([part[at] for part in maps]).to("cpu", self.dtype)
            values = memoryview(row.contiguous().view(-1).view(torch.uint8).numpy().data)
            trailer = crc32(values).to_bytes(4, "little") + self._mark(number)
            try:
                os.pwritev(self._file.fileno(), [values, trailer], number * self._stride)
            except OSError as error:
                raise ValueError(f"{self._file.name} cannot be written: {error.strerror}") from error

    def _read_row(self, row: Tensor, number: int) -> bool:
        """Whether the sample has a row, which is read into `row`, uint8."""
        place = memoryview(row.numpy().data)
        if os.preadv(self._file.fileno(), [place], number * self._stride) != self._stride:
            return False
        values, trailer = place[: self._values], bytes(place[self._values : self._values + _TRAILER])
        return trailer[4:] == self._mark(number) and trailer[:4] == crc32(values).to_bytes(4, "little")

    def _mark(self, number: int) -> bytes:
        """What tells a sample's row from those of others and from rows of another key."""
        return crc32(number.to_bytes(8, "little"), self._key).to_bytes(4, "little")


def _claim(folder: Path, text: str, size: int) -> None:
    """Make the two files, or find that they are those of `text`."""
    path = folder / KEY_FILE
    if path.exists():
        before, now = (_fields(found) for found in (path.read_text(), text))
        if before != now:
            differs = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            raise ValueError(
                f"task.cache_features {folder} holds features of another {', '.join(differs)}; name another "
                f"folder, or delete it"
            )
    else:
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, path)
    with (folder / ROWS_FILE).open("ab") as file:
        if file.tell() != size:
            file.truncate(size)  # rows that are not written take no space


def _fields(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
