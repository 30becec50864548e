"""The folder of a run's checkpoints: which of them count, which is the newest, and what is kept.

    checkpoints/latest                             name of the checkpoint that a new start goes on from
    checkpoints/step_00001000/manifest.json        everything but the tensors; written last
    checkpoints/step_00001000/rank_00000.safetensors   what rank 0 owned, and so on

A folder counts once it has its name and a manifest; until then it is called `.partial`.

The run's past is the checkpoint that `latest` names and those of earlier steps. Only these are pruned, the
oldest first, so what `latest` names is never deleted. Checkpoints of later steps are a future that the run
has left: it was rolled back, or somebody has written an older name into `latest`. When the run goes on from
there they are set aside under the name `.abandoned`, which nothing resumes from, and they are deleted once
the run has saved a step as late as theirs. A damaged checkpoint is set aside as `.damaged`, and stays.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, STEP_FOLDER, Checkpoint
from megavit.train.checkpoint.manifest import CheckpointError

POINTER_FILE = "latest"
_PARTIAL, _DAMAGED, _ABANDONED = ".partial", ".damaged", ".abandoned"


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step that the folder's name says, whether it counts or was set aside."""
    named = STEP_FOLDER.match(folder.name)
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
    found = [
        name for name in names if STEP_FOLDER.fullmatch(name.removesuffix(suffix)) and name.endswith(suffix)
    ]
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
    if not STEP_FOLDER.fullmatch(text):
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
