"""Checkpoints on disk: what is in one, when it counts, and how any layout reads its share of it.

    checkpoints/latest                             name of the newest committed checkpoint
    checkpoints/step_00001000/manifest.json        everything but the tensors; written last
    checkpoints/step_00001000/rank_00000.safetensors   what rank 0 owned, and so on

A rank's file holds flat slices of its TP shards: the fp32 weights and the optimizer's moments, as ZeRO cut
them. The manifest says which slice of which logical tensor each is, so that a run of any (tp, dp, ZeRO stage)
reads just the boxes it needs, and one process reads whole tensors. A folder counts once it has its name and a
manifest; until then it is called `.partial`. Nothing here needs ranks, a GPU or DeepSpeed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from megavit.config import model_config
from megavit.parallel.layout import Box, Layout
from megavit.train.tensorfile import TensorFile, checksum_of

MANIFEST_FILE = "manifest.json"
POINTER_FILE = "latest"
WEIGHT = "weight"  # the other kinds are the optimizer's own names: exp_avg, exp_avg_sq
_FORMAT = "megavit-checkpoint-2"
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file, and the slice [start, stop) of the flattened shard that it holds of each tensor
    (all kinds alike)."""

    name: str
    bytes: int
    crc32: int
    tp_rank: int
    slices: dict[str, tuple[int, int]]


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

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the manifest. CheckpointError if there is none or it is damaged or of another version."""
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a committed checkpoint: {MANIFEST_FILE} is missing")
        try:
            fields = json.loads(path.read_text())
            found = fields.pop("format", None)
            if found != _FORMAT:
                raise CheckpointError(f"{path}: its format is {found!r}, this version reads {_FORMAT!r}")
            if fields.pop("checksum") != _digest(fields):
                raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged: {error}") from error
        layouts = {
            name: Layout(tuple(item["shape"]), item["dim"], tuple(item["parts"]))
            for name, item in fields.pop("tensors").items()
        }
        names = list(layouts)
        files = tuple(
            RankFile(**item | {"slices": {names[i]: (start, stop) for i, start, stop in item["slices"]}})
            for item in fields.pop("files")
        )
        model_config(fields["run"]["model"])  # names a field that this version does not know, before any work
        kinds = tuple(fields.pop("kinds"))
        return Checkpoint(folder=folder, layouts=layouts, files=files, kinds=kinds, **fields)

    def manifest(self) -> dict[str, Any]:
        """The JSON object that `open` reads back."""
        numbers = {name: number for number, name in enumerate(self.layouts)}
        fields = asdict(self)
        del fields["folder"]
        fields["tensors"] = fields.pop("layouts")
        for item in fields["files"]:
            item["slices"] = [[numbers[name], *ends] for name, ends in item["slices"].items()]
        fields = json.loads(json.dumps(fields))  # tuples become lists before they are hashed
        return {"format": _FORMAT, "checksum": _digest(fields), **fields}

    def check_tiling(self) -> None:
        """CheckpointError unless the slices of all ranks fill every shard exactly: no hole, no overlap."""
        for name, layout in self.layouts.items():
            numel = int(np.prod(layout.local_shape(self.tp_size)))
            for tp_rank in range(self.tp_size if layout.dim is not None else 1):
                slices = sorted(
                    file.slices[name]
                    for file in self.files
                    if file.tp_rank == tp_rank and name in file.slices
                )
                ends = [0, *(stop for _, stop in slices)]
                if [start for start, _ in slices] != ends[:-1] or ends[-1] != numel:
                    raise CheckpointError(
                        f"{self.folder}: the slices {slices[:8]} of {name}, TP rank {tp_rank}, do not fill "
                        f"its {numel} elements"
                    )

    def damage(self, files: Iterable[RankFile], progress: Callable[[int], None] | None = None) -> list[str]:
        """Re-read every byte of `files`; a sentence for each that is missing, truncated or altered."""
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

    def rank_state(self, file: RankFile, name: str) -> np.ndarray | None:
        """Bytes that a rank saved beside its slices (random generators)."""
        content = self._open(file)
        return content[name] if name in content else None  # noqa: SIM401

    def close(self) -> None:
        """Unmap the files."""
        self._opened.clear()

    @cached_property
    def _opened(self) -> dict[str, TensorFile]:
        return {}

    def _open(self, file: RankFile) -> TensorFile:
        if file.name not in self._opened:
            self._opened[file.name] = TensorFile(self.folder / file.name)
        return self._opened[file.name]

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


def _digest(fields: dict[str, Any]) -> str:
    return f"{crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


# The folder of a run's checkpoints.


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a manifest, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{MANIFEST_FILE}") if path.parent.suffix == "")


def find_latest(run_dir: Path) -> Path | None:
    """The checkpoint that the pointer names, or without a pointer the newest committed one; None if there is
    none.

    CheckpointError if the pointer names one that is not there.
    """
    folder = checkpoints_of(run_dir)
    found = committed(folder)
    pointer = folder / POINTER_FILE
    if not pointer.is_file():
        return found[-1] if found else None
    named = folder / pointer.read_text().strip()
    if named not in found:
        raise CheckpointError(f"{pointer} names {named.name!r}, which is missing or has no {MANIFEST_FILE}")
    return named


def open_step(run_dir: Path, step: int | None = None) -> Checkpoint:
    """The run's checkpoint of `step`, or its newest. CheckpointError, naming those there are, if it has
    none."""
    folder = checkpoints_of(run_dir)
    path = find_latest(run_dir) if step is None else folder / folder_name(step)
    found = committed(folder)
    if path is None or path not in found:
        steps = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{run_dir} holds no committed checkpoint{_of(step)}; there are: {steps}")
    return Checkpoint.open(path)


def _of(step: int | None) -> str:
    return "" if step is None else f" of step {step}"


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give the finished folder `partial` its manifest, its name `final`, and the pointer; each is on the disk
    before the next begins."""
    _write_durably(partial / MANIFEST_FILE, json.dumps(manifest, separators=(",", ":")) + "\n")
    _flush_folder(partial)
    if final.exists():
        discard(final)
    os.rename(partial, final)
    _flush_folder(final.parent)
    point_to(final)


def point_to(checkpoint: Path) -> None:
    """Make `checkpoint` the one that a new start of the run goes on from."""
    pointer = checkpoint.parent / POINTER_FILE
    following = pointer.with_name(POINTER_FILE + _PARTIAL)
    _write_durably(following, checkpoint.name + "\n")
    os.replace(following, pointer)
    _flush_folder(checkpoint.parent)


def set_aside_latest(run_dir: Path) -> str:
    """Rename the newest checkpoint to `*.damaged` and point to the one before it, whose name is returned.

    CheckpointError if there is none before it; then nothing is changed.
    """
    folder = checkpoints_of(run_dir)
    pointer = folder / POINTER_FILE
    found = committed(folder)
    latest = folder / pointer.read_text().strip() if pointer.is_file() else found[-1]
    before = [path for path in found if path.name < latest.name]
    if not before:
        raise CheckpointError(f"{folder} holds no checkpoint before {latest.name}; nothing to go on from")
    for path in (path for path in found if path.name >= latest.name):
        shutil.rmtree(path.with_name(path.name + _DAMAGED), ignore_errors=True)
        os.rename(path, path.with_name(path.name + _DAMAGED))
    point_to(before[-1])
    return before[-1].name


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one does not count."""
    leaving = checkpoint.with_name(f"{checkpoint.name}.old{_PARTIAL}")
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints and, with `keep_every`, those of its multiples."""
    for path in committed(folder)[:-keep]:
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every:
            discard(path)


def clean(folder: Path) -> None:
    """Delete what an interrupted save or deletion left. Only while nobody saves."""
    for path in folder.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def partial_folder(folder: Path, step: int) -> Path:
    """Where the ranks write the checkpoint of `step` before it counts."""
    return folder / (folder_name(step) + _PARTIAL)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
