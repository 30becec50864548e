"""Checkpoints on disk: what is in one, which of them count, and how any layout reads its share of one.

    checkpoints/latest                             name of the checkpoint that a new start goes on from
    checkpoints/step_00001000/manifest.json        everything but the tensors; written last
    checkpoints/step_00001000/rank_00000.safetensors   what rank 0 owned, and so on

A rank's file holds flat slices of its TP shards: the fp32 weights and the optimizer's moments, as ZeRO cut
them. The manifest says which slice of which logical tensor each is, so that a run of any (tp, dp, ZeRO stage)
reads just the boxes it needs, and one process reads whole tensors. A folder counts once it has its name and a
manifest; until then it is called `.partial`. Nothing here needs ranks, a GPU or DeepSpeed.

The run's past is the checkpoint that `latest` names and those of earlier steps. Only these are pruned, the
oldest first, so what `latest` names is never deleted. Checkpoints of later steps are a future that the run
has left: it was rolled back, or somebody has written an older name into `latest`. When the run goes on from
there they are set aside under the name `.abandoned`, which nothing resumes from, and they are deleted once
the run has saved a step as late as theirs. A damaged checkpoint is set aside as `.damaged`, and stays.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megavit.parallel.layout import Box, Layout
from megavit.train.manifest import WEIGHT as WEIGHT
from megavit.train.manifest import CheckpointError, RankFile, read_manifest, seal
from megavit.train.tensorfile import Entry, TensorFile, checksum_of

MANIFEST_FILE = "manifest.json"
POINTER_FILE = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL, _DAMAGED, _ABANDONED = ".partial", ".damaged", ".abandoned"


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
        """Read and check the manifest. CheckpointError if there is none or it is damaged, or of another
        version."""
        opened = Checkpoint(folder=folder, **read_manifest(folder / MANIFEST_FILE))
        named = _NAME.match(folder.name)
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


# The folder of a run's checkpoints.


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that the folder's name says, whether it counts or was set aside."""
    named = _NAME.match(folder.name)
    assert named, folder
    return int(named[1])


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a manifest, oldest first. OSError if it cannot be searched."""
    return [path for path in _named(folder) if _exists(path / MANIFEST_FILE)]


def _named(folder: Path, suffix: str = "") -> list[Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [name for name in names if _NAME.fullmatch(name.removesuffix(suffix)) and name.endswith(suffix)]
    return sorted((folder / name for name in found), key=step_of)


def _exists(path: Path) -> bool:
    """As `Path.exists`, but a folder that may not be entered is an error, not an absent file."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def find_latest(run_dir: Path) -> Path | None:
    """The checkpoint that the pointer names, or without a pointer the newest committed one; None if there is
    none.

    CheckpointError if the pointer cannot be read or names one that is not there.
    """
    return _latest_in(checkpoints_of(run_dir))


def _latest_in(folder: Path) -> Path | None:
    found = committed(folder)
    named = _pointed_to(folder)
    if named is None:
        return found[-1] if found else None
    if named not in found:
        raise CheckpointError(
            f"{folder / POINTER_FILE} names {named.name!r}, which is missing or has no {MANIFEST_FILE}; "
            f"{_advice(found)}"
        )
    return named


def _pointed_to(folder: Path) -> Path | None:
    """What the pointer names; None without a pointer."""
    pointer = folder / POINTER_FILE
    try:
        text = pointer.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        text = "\ufffd"
    except OSError as error:
        raise CheckpointError(
            f"{pointer} cannot be read: {error.strerror or error}; {_advice(committed(folder))}"
        ) from error
    if not _NAME.fullmatch(text):
        raise CheckpointError(
            f"{pointer} names {text!r:.60}, which is no checkpoint; {_advice(committed(folder))}"
        )
    return folder / text


def _advice(found: list[Path]) -> str:
    if not found:
        return "there are none; remove it to start anew"
    names = ", ".join(path.name for path in found)
    return f"there are: {names}; write one of these into it, or remove it to go on from the last of them"


def open_step(run_dir: Path, step: int | None = None) -> Checkpoint:
    """The run's checkpoint of `step`, or its newest. CheckpointError, naming those there are, if it has
    none."""
    folder = checkpoints_of(run_dir)
    if not _exists(run_dir):
        raise CheckpointError(f"the run folder {run_dir} does not exist")
    path = find_latest(run_dir) if step is None else folder / folder_name(step)
    found = committed(folder)
    if path is None or path not in found:
        steps = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{run_dir} holds no committed checkpoint{_of(step)}; there are: {steps}")
    return Checkpoint.open(path)


def _of(step: int | None) -> str:
    return "" if step is None else f" of step {step}"


def committed_before(run_dir: Path, step: int) -> int | None:
    """The step of the newest checkpoint in the run's past that is of `step` or an earlier one; None if there
    is none."""
    steps = [step_of(path) for path in _past(checkpoints_of(run_dir)) if step_of(path) <= step]
    return steps[-1] if steps else None


def _past(folder: Path) -> list[Path]:
    """The checkpoint that the pointer names, and those of earlier steps, oldest first."""
    latest = _latest_in(folder)
    return [path for path in committed(folder) if step_of(path) <= step_of(latest)] if latest else []


def commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give the finished folder `partial` its manifest, its name `final`, and the pointer; each is on the disk
    before the next begins."""
    _write_durably(partial / MANIFEST_FILE, json.dumps(manifest, separators=(",", ":")) + "\n")
    _flush_folder(partial)
    if _exists(final):
        _set_aside(final, _ABANDONED)
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


def go_back(run_dir: Path, step: int) -> None:
    """Make the checkpoint of `step` the one that the run goes on from, now and at a new start; those of later
    steps are abandoned."""
    folder = checkpoints_of(run_dir)
    point_to(folder / folder_name(step))
    abandon_later(folder, step)


def abandon_later(folder: Path, step: int) -> list[str]:
    """Set aside the checkpoints of later steps than `step`, which the run goes on from; their names."""
    later = [path for path in committed(folder) if step_of(path) > step]
    for path in later:
        _set_aside(path, _ABANDONED)
    return [path.name for path in later]


def set_aside_latest(run_dir: Path) -> str:
    """Rename the newest checkpoint to `*.damaged` and point to the one before it, whose name is returned. If
    it is the pointer that is damaged, only that is mended: it then names the newest one.

    CheckpointError if there is none before it; then nothing is changed.
    """
    folder = checkpoints_of(run_dir)
    found = committed(folder)
    try:
        latest = _pointed_to(folder) or (found[-1] if found else None)
    except CheckpointError:
        latest = None
    before = [path for path in found if latest is None or step_of(path) < step_of(latest)]
    if not before:
        name = f" before {latest.name}" if latest else ""
        raise CheckpointError(f"{folder} holds no checkpoint{name}; nothing to go on from")
    point_to(before[-1])  # first: a kill in between leaves a pointer that can be followed
    if latest in found:
        _set_aside(latest, _DAMAGED)
    return before[-1].name


def _set_aside(checkpoint: Path, suffix: str) -> None:
    aside = checkpoint.with_name(checkpoint.name + suffix)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one does not count."""
    leaving = checkpoint.with_name(f"{checkpoint.name}.old{_PARTIAL}")
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Delete all of the run's past but the newest `keep` checkpoints and, with `keep_every`, those of its
    multiples; and the abandoned ones that the run has overtaken."""
    past = _past(folder)
    surplus = [path for path in past[:-keep] if not keep_every or step_of(path) % keep_every]
    overtaken = [path for path in _named(folder, _ABANDONED) if past and step_of(path) <= step_of(past[-1])]
    for path in [*surplus, *overtaken]:
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
