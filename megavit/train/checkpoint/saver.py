"""Saving and restoring on a mesh: every rank writes and reads its own part, all agree before anything counts.

A save copies the rank's state to host memory, which is all that the training waits for; a thread then writes,
flushes and checksums it, and agrees with the other ranks over a process group of its own. The main rank
commits: manifest, name, pointer. Whatever goes wrong on any rank before (the disk or the memory is full)
becomes a failed save that every rank reports: nothing counts and the former checkpoint stays. Only when the
ranks can no longer agree, because one is lost, there is no way on: the next call raises SaveError, and since
a rank that ends closes its connections, the others' calls do so too.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.parallel.layout import Box, Layout
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import folder as checkpoint
from megavit.train.checkpoint.checkpoint import MANIFEST_FILE, Checkpoint
from megavit.train.checkpoint.frozen import Read
from megavit.train.checkpoint.manifest import WEIGHT, CheckpointError, RankFile
from megavit.train.checkpoint.shared_io import run_together
from megavit.train.checkpoint.tensorfile import Entry, write_tensors
from megavit.train.config import CheckpointConfig
from megavit.train.zero_state import MOMENTS, Slice, ZeroState

_RNG = "rng"


class SaveError(RuntimeError):
    """The run cannot go on, because its state could not be saved; the message says why."""


class Saved(NamedTuple):
    """The end of one save. `error` is empty if it was committed; `stall_s` is how long training was held up;
    `note` says what went wrong afterwards, on the main rank only."""

    step: int
    folder: Path
    error: str
    bytes: int
    stall_s: float
    write_s: float
    note: str = ""


class Progress(NamedTuple):
    """Of this rank's file: bytes written, bytes in all, seconds since training went on. `moved_bytes` are
    written by all ranks so far; while it grows, nobody hangs."""

    bytes: int
    total_bytes: int
    elapsed_s: float
    moved_bytes: int


class _Copy(NamedTuple):
    """The state of this rank as it will be written, and what the manifest says of it."""

    slices: list[Slice]
    entries: dict[str, Entry]
    data: list[np.ndarray]
    optimizer: dict[str, Any]
    layouts: dict[str, Layout]


class _Report(NamedTuple):
    """What a rank tells the main rank of its file."""

    file: RankFile | None
    steps: dict[str, int]
    error: str


class Saver:
    """Writes the checkpoints of one run. Collective: all ranks call the same methods in the same order.

    Costs host memory for this rank's share of weights and moments (12 bytes a parameter over the ranks with
    Adam), page-locked on a GPU, kept between saves.
    """

    def __init__(
        self, run_dir: Path, config: CheckpointConfig, mesh: Mesh, state: ZeroState, committed_step: int = 0
    ):
        self.folder = checkpoint.checkpoints_of(run_dir)
        self._run_dir, self._config, self._mesh, self._state = run_dir, config, mesh, state
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []
        self._lost = ""
        self._buffer = torch.empty(0)
        self._total_bytes = self._written_bytes = self._moved_bytes = 0
        self._started = 0.0
        self.committed_step = committed_step  # of the newest checkpoint

    def save(self, step: int, fields: dict[str, Any]) -> None:
        """Begin to save the state after `step` updates; `fields` are the manifest's state, run, ds_config and
        frozen.

        Waits for an earlier save first. Returns once training may go on; `finished` tells the end. Does
        nothing if this step has been saved. SaveError if the ranks cannot agree any more.
        """
        started = time.perf_counter()
        self.wait()
        self._check_agreement()
        if step == self.committed_step:
            return
        self._total_bytes = self._written_bytes = self._moved_bytes = 0
        copy: _Copy | str
        try:
            copy = self._copy()
            self._total_bytes = sum(entry.num_bytes for entry in copy.entries.values())
        except Exception as error:  # raised here, it would leave the others waiting for this rank
            copy = _describe(error)
        self._started = time.perf_counter()
        arguments = (step, fields, copy, self._started - started)
        # A daemon: a rank that ends with an error must not wait for the others' files.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def finished(self) -> list[Saved]:
        """The saves that have ended since the last call. SaveError if the ranks cannot agree any more."""
        self._check_agreement()
        done = self._finished[:]
        del self._finished[: len(done)]
        return done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the save under way has ended, or for `timeout_s`; whether it has."""
        if self._thread:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def progress(self) -> Progress | None:
        """How far this rank's part of the save under way is; None when there is none."""
        if self._thread is None or not self._thread.is_alive():
            return None
        elapsed_s = time.perf_counter() - self._started
        return Progress(self._written_bytes, self._total_bytes, elapsed_s, self._moved_bytes)

    def go_back(self, step: int) -> Checkpoint | None:
        """Make the newest checkpoint of `step` or before the one that the run goes on from, and open it;
        later ones are abandoned. None, and nothing is changed, if there is none. Waits for a save under way.
        Collective."""
        self.wait()
        found = self._mesh.on_main(lambda: self._go_back(step))
        if found:
            self.committed_step = found.step
        return found

    def _go_back(self, step: int) -> Checkpoint | None:
        before = checkpoint.committed_before(self._run_dir, step)
        if before is None:
            return None
        found = checkpoint.open_step(self._run_dir, before)
        checkpoint.go_back(self._run_dir, before)
        return found

    def _check_agreement(self) -> None:
        if self._lost:
            raise SaveError(
                f"the ranks can no longer agree on a checkpoint, so this one ends: {self._lost}; the newest "
                f"checkpoint is that of step {self.committed_step}"
            )

    def _copy(self) -> _Copy:
        """The rank's state in host memory. May fail for want of it."""
        # One slice after the other in memory, kind by kind, as they will lie in the file.
        slices = list(self._state.owned())
        entries, tensors = _arrange(slices)
        buffer = self._copy_to_host(tensors)
        generators = _generator_state(self._mesh.device)
        entries[_RNG] = Entry("U8", generators.shape)  # last: the numbers before it stay aligned
        layouts = self._state.layouts
        return _Copy(slices, entries, [buffer, generators], self._state.optimizer_state(), layouts)

    def _copy_to_host(self, tensors: list[Tensor]) -> np.ndarray:
        size = sum(tensor.numel() for tensor in tensors)
        if self._buffer.numel() != size:
            pin = self._mesh.device.type == "cuda"
            self._buffer = torch.empty(size, dtype=torch.float32, pin_memory=pin)
        at = 0
        for tensor in tensors:
            self._buffer[at : at + tensor.numel()].copy_(tensor, non_blocking=True)
            at += tensor.numel()
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return self._buffer.numpy()

    def _run(self, step: int, fields: dict[str, Any], copy: _Copy | str, stall_s: float) -> None:
        """In the thread: write this rank's file, agree, commit, and delete what is no longer kept."""
        final = self.folder / checkpoint.folder_name(step)
        try:
            error, size = self._write_and_agree(step, fields, copy)
        except Exception as caught:  # of the agreement: it is raised in the main thread
            self._lost = _describe(caught)
            return
        write_s, note = time.perf_counter() - self._started, ""
        if not error:
            self.committed_step = step
            if self._mesh.is_main:
                note = self._prune()
        self._finished.append(Saved(step, final, error, size, stall_s, write_s, note))

    def _write_and_agree(self, step: int, fields: dict[str, Any], copy: _Copy | str) -> tuple[str, int]:
        """What went wrong, on whichever rank, or nothing; and the size of the checkpoint."""
        mesh = self._mesh
        partial = checkpoint.partial_folder(self.folder, step)
        report = run_together(mesh, lambda count: self._write(partial, step, copy, count), self._note_moved)
        reports: list[_Report] = mesh.gather_for_io(report)
        error, size = "", 0
        if mesh.is_main:
            error = "; ".join(report.error for report in reports if report.error)
            size = sum(report.file.bytes for report in reports if report.file)
            if not error:
                assert not isinstance(copy, str)  # its error would have been reported
                error = self._commit(step, partial, reports, copy, fields)
            if error:
                shutil.rmtree(partial, ignore_errors=True)
        error, size = mesh.broadcast_for_io((error, size))
        return error, size

    def _write(self, partial: Path, step: int, copy: _Copy | str, count: Callable[[int], None]) -> _Report:
        """This rank's file, or why there is none: of any kind, for all ranks wait for this report."""
        mesh = self._mesh
        name = f"rank_{mesh.global_rank:05d}.safetensors"
        metadata = {"step": str(step), "tp_rank": str(mesh.tp_rank), "tp_size": str(mesh.tp_size)}

        def written_here(num_bytes: int) -> None:
            self._written_bytes += num_bytes
            count(num_bytes)

        if isinstance(copy, str):
            return _Report(None, {}, f"rank {mesh.global_rank}: {copy}")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            written = write_tensors(partial / name, copy.entries, copy.data, metadata, written_here)
        except Exception as error:
            return _Report(None, {}, f"rank {mesh.global_rank}: {_describe(error)}")
        places = {part.name: (part.start, part.stop) for part in copy.slices}
        return _Report(RankFile(name, *written, mesh.tp_rank, places), copy.optimizer["steps"], "")

    def _note_moved(self, num_bytes: int) -> None:
        self._moved_bytes = num_bytes

    def _commit(
        self, step: int, partial: Path, reports: list[_Report], copy: _Copy, fields: dict[str, Any]
    ) -> str:
        """On the main rank: make the checkpoint count. An error's text, or nothing."""
        final = self.folder / checkpoint.folder_name(step)
        try:
            steps = {name: count for report in reports for name, count in report.steps.items()}
            described = Checkpoint(
                folder=final,
                step=step,
                tp_size=self._mesh.tp_size,
                dp_size=self._mesh.dp_size,
                kinds=(WEIGHT, *MOMENTS),
                layouts=copy.layouts,
                files=tuple(report.file for report in reports if report.file),
                optimizer=copy.optimizer | {"steps": steps},
                saved_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **fields,
            )
            described.check_tiling()
            checkpoint.commit(partial, final, described.manifest())
        except Exception as error:  # of any kind: all ranks wait for the answer
            return f"main rank: {_describe(error)}"
        return ""

    def _prune(self) -> str:
        """Delete the checkpoints that are no longer kept. The saved one counts, whatever comes of it: a note,
        or nothing."""
        try:
            checkpoint.prune(self.folder, self._config.keep, self._config.keep_every)
        except Exception as error:  # of any kind: the thread has to report the save
            return f"older checkpoints could not be deleted: {_describe(error)}"
        return ""


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def open_latest(run_dir: Path, on_damage: str, mesh: Mesh, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from, every byte of it verified by some rank; None in a new run folder.

    With `on_damage` "previous" a damaged one is set aside (renamed to *.damaged) and the one before it is
    taken. Those of later steps are abandoned. Raises CheckpointError, naming the damaged files, on every
    rank. Collective over the world; no other job may use the run folder.
    """
    mesh.on_main(lambda: checkpoint.clean(checkpoint.checkpoints_of(run_dir)))
    while True:
        found, problems = mesh.on_main(lambda: _open(run_dir))
        if found:
            mine = found.files[mesh.global_rank :: mesh.world_size]
            problems = [problem for some in mesh.gather(found.damage(mine)) for problem in some]
        if not problems:
            break
        if on_damage == "stop":
            advice = "restore it, or go on from the one before it with --checkpoint.on_damage previous"
            raise CheckpointError("\n".join([*problems, advice]))
        for problem in problems:
            say(f"note: {problem}")
        named = mesh.on_main(lambda: checkpoint.set_aside_latest(run_dir))
        say(f"note: going on from {named}")
    if found:
        folder, step = found.folder.parent, found.step
        for name in mesh.on_main(lambda: checkpoint.abandon_later(folder, step)):
            say(f"note: {name} is set aside as {name}.abandoned; the run goes on from {found.folder.name}")
    return found


def _open(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint, or what is wrong with it."""
    try:
        path = checkpoint.find_latest(run_dir)
        return (Checkpoint.open(path) if path else None), []
    except CheckpointError as error:
        return None, [str(error)]


def restore(source: Checkpoint, state: ZeroState, mesh: Mesh, read_frozen: Read | None = None) -> None:
    """Copy weights, moments and update counts into the engine's own buffers, reading this rank's boxes only;
    `read_frozen` reads the frozen weights, which the checkpoint does not hold, and are left as they are
    without it. CheckpointError if the checkpoint holds other tensors than the engine. Collective over DP."""
    _check_fits(source, {name: layout.shape for name, layout in state.layouts.items()})

    def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
        (source.read if name in source.layouts else read_frozen or source.read)(name, boxes, out)

    state.load(read, moments=True, leave=() if read_frozen else state.frozen_layouts)
    state.set_steps(source.optimizer["steps"])
    if (source.tp_size, source.dp_size) == (mesh.tp_size, mesh.dp_size):
        file = source.files[mesh.global_rank]
        try:
            _set_generator_state(source.rank_state(file, _RNG), mesh.device)
        except RuntimeError as error:
            raise CheckpointError(f"{source.folder / file.name}: {_RNG!r} is unusable: {error}") from error
    source.close()


def _check_fits(source: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    saved = {name: layout.shape for name, layout in source.layouts.items()}
    problems = [
        f"{name} has shape {saved.get(name)}, this model's is {shapes.get(name)}"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]
    problems += [f"optimizer.steps lacks {name}" for name in shapes if name not in source.optimizer["steps"]]
    if lacking := sorted({*MOMENTS} - {*source.kinds}):
        problems.append(f"kinds lacks {lacking[0]}")
    if problems:
        raise CheckpointError(f"{source.folder / MANIFEST_FILE} does not fit this run: {problems[0]}")


def _arrange(slices: list[Slice]) -> tuple[dict[str, Entry], list[Tensor]]:
    """The file's entries, kind by kind, and the tensors that fill them."""
    kinds = (WEIGHT, *MOMENTS)
    found = [(f"{kind}/{part.name}", part.tensors[kind]) for kind in kinds for part in slices]
    return {key: Entry("F32", (tensor.numel(),)) for key, tensor in found}, [tensor for _, tensor in found]


def _generator_state(device: torch.device) -> np.ndarray:
    """The states of torch's default generators, one after the other. Dropout is seeded anew every step, so
    they matter to a user's own code only."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).numpy()


def _set_generator_state(saved: np.ndarray, device: torch.device) -> None:
    state = torch.from_numpy(saved.copy())
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:], device)
