"""One checkpoint: what is in it, and how any layout reads its share of it.

A rank's file holds flat slices of its TP shards: the fp32 weights and the optimizer's moments, as ZeRO cut
them. The manifest says which slice of which logical tensor each is, so that a run of any (tp, dp, ZeRO stage)
reads just the boxes it needs, and one process reads whole tensors. Nothing here needs ranks, a GPU or
DeepSpeed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megavit.parallel.layout import Box, Layout
from megavit.train.checkpoint.manifest import CheckpointError, Frozen, RankFile, read_manifest, seal
from megavit.train.checkpoint.tensorfile import Entry, TensorFile, checksum_of

MANIFEST_FILE = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened: its manifest is read, its tensors are read on demand.

    `state` is what the loop keeps beside the tensors (data position, counters, ...), `optimizer` the type,
    steps and groups; `model`, `run` and `ds_config` are the configuration, as it was resolved.
    """

    folder: Path
    step: int
    tp_size: int
    dp_size: int
    kinds: tuple[str, ...]
    layouts: dict[str, Layout]
    files: tuple[RankFile, ...]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    run: dict[str, Any]
    ds_config: dict[str, Any]
    saved_at: str
    frozen: Frozen = field(default_factory=Frozen)

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read and check the manifest. CheckpointError if there is none or it is damaged, or of another
        version."""
        opened = Checkpoint(folder=folder, **read_manifest(folder / MANIFEST_FILE))
        named = STEP_FOLDER.match(folder.name)
        if named and int(named[1]) != opened.step:
            raise CheckpointError(f"{folder} holds the checkpoint of step {opened.step}; was it renamed?")
        opened.check_tiling()
        return opened

    def manifest(self) -> dict[str, Any]:
        """The JSON object that `open` reads back."""
        numbers = {name: number for number, name in enumerate(self.layouts)}
        fields = asdict(self)
        del fields["folder"]
        fields["tensors"] = fields.pop("layouts")
        if not self.frozen.layouts:
            del fields["frozen"]
        for item in fields["files"]:
            item["slices"] = [[numbers[name], *ends] for name, ends in item["slices"].items()]
        fields = json.loads(json.dumps(fields))  # tuples become lists before they are hashed
        return seal(fields)

    def check_tiling(self) -> None:
        """CheckpointError unless the slices of all ranks fill every shard exactly: no hole, no overlap."""
        found: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for file in self.files:
            for name, slice_ in file.slices.items():
                found[name, file.tp_rank].append(slice_)
        for name, layout in self.layouts.items():
            numel = math.prod(layout.local_shape(self.tp_size))
            for tp_rank in range(self.tp_size if layout.dim is not None else 1):
                slices = sorted(found[name, tp_rank])
                ends = [0, *(stop for _, stop in slices)]
                if [start for start, _ in slices] != ends[:-1] or ends[-1] != numel:
                    raise CheckpointError(
                        f"{self.folder}: the slices {slices[:8]} of {name}, TP rank {tp_rank}, do not fill "
                        f"its {numel} elements"
                    )

    def damage(self, files: Iterable[RankFile], progress: Callable[[int], None] | None = None) -> list[str]:
        """Re-read every byte of `files`; a sentence for each that is missing, truncated or altered, or does
        not hold what the manifest says."""
        problems = []
        for file in files:
            path = self.folder / file.name
            try:
                size, checksum = checksum_of(path, progress)
            except OSError as error:
                problems.append(f"{path} cannot be read: {error.strerror or error}")
                continue
            if size != file.bytes:
                problems.append(f"{path} is truncated or altered: {size:,} bytes instead of {file.bytes:,}")
            elif checksum != file.crc32:
                problems.append(f"{path} is damaged: checksum {checksum:08x} instead of {file.crc32:08x}")
            else:
                try:
                    self._mapped(file)
                except CheckpointError as error:
                    problems.append(str(error))
        return problems

    def read(self, name: str, boxes: Sequence[Box], out: dict[str, np.ndarray]) -> None:
        """Fill the flat float32 slices `out`, by kind, that `boxes` describe (of any TP size) with tensor
        `name`.

        Reads the parts of the files that overlap. Elements in no box (padding) stay as they are.
        """
        missing = sum(box.rows * box.columns for box in boxes)
        for file in self.files:
            if name not in file.slices:
                continue
            theirs = self.layouts[name].boxes(file.tp_rank, self.tp_size, *file.slices[name])
            for mine, other in itertools.product(boxes, theirs):
                missing -= self._copy_overlap(file, name, mine, other, out)
        if missing:
            raise CheckpointError(f"{self.folder} lacks {missing} elements of {name}")

    def tensor(self, kind: str, name: str) -> np.ndarray:
        """The whole logical tensor, float32; holds just this one in memory."""
        layout = self.layouts[name]
        whole = np.empty(layout.shape, np.float32)
        self.read(name, layout.boxes(0, 1, 0, whole.size), {kind: whole.reshape(-1)})
        return whole

    def rank_state(self, file: RankFile, name: str) -> np.ndarray:
        """Bytes that a rank saved beside its slices (random generators)."""
        content = self._open(file)
        if name not in content.entries:
            raise CheckpointError(f"{self.folder / file.name} lacks {name!r}")
        return content[name]

    def close(self) -> None:
        """Unmap the files."""
        self._opened.clear()

    @cached_property
    def _opened(self) -> dict[str, TensorFile]:
        return {}

    def _open(self, file: RankFile) -> TensorFile:
        if file.name not in self._opened:
            self._opened[file.name] = self._mapped(file)
        return self._opened[file.name]

    def _mapped(self, file: RankFile) -> TensorFile:
        """The file in memory; CheckpointError unless it holds the tensors that the manifest says."""
        path = self.folder / file.name
        try:
            content = TensorFile(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for kind, (name, (start, stop)) in itertools.product(self.kinds, file.slices.items()):
            found, expected = content.entries.get(f"{kind}/{name}"), Entry("F32", (stop - start,))
            if found != expected:
                raise CheckpointError(f"{path} holds {found} as {kind}/{name}, the manifest says {expected}")
        return content

    def _copy_overlap(
        self, file: RankFile, name: str, mine: Box, other: Box, out: dict[str, np.ndarray]
    ) -> int:
        top, bottom = max(mine.row, other.row), min(mine.row + mine.rows, other.row + other.rows)
        left = max(mine.column, other.column)
        right = min(mine.column + mine.columns, other.column + other.columns)
        if top >= bottom or left >= right:
            return 0
        part = slice(top, bottom), slice(left, right)
        for kind, slice_ in out.items():
            stored = self._open(file)[f"{kind}/{name}"]
            _view(slice_, mine, *part)[...] = _view(stored, other, *part)
        return (bottom - top) * (right - left)


def _view(flat: np.ndarray, box: Box, rows: slice, columns: slice) -> np.ndarray:
    """The part of the logical matrix at `rows` and `columns`, in a flat slice that holds `box`."""
    matrix = flat[box.offset : box.offset + box.rows * box.columns].reshape(box.rows, box.columns)
    return matrix[
        rows.start - box.row : rows.stop - box.row, columns.start - box.column : columns.stop - box.column
    ]
