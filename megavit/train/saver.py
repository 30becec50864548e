"""Saving and restoring on a mesh: every rank writes and reads its own part, all agree before anything counts.

A save copies the rank's state to host memory, which is all that the training waits for; a thread then writes,
flushes and checksums it, and agrees with the other ranks over a process group of its own. The main rank
commits: manifest, name, pointer. If any rank fails (disk full), nothing counts and the former checkpoint
stays.
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

from megavit.config import CheckpointConfig
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.mesh import Mesh
from megavit.train import checkpoint
from megavit.train.checkpoint import WEIGHT, Checkpoint, CheckpointError, RankFile
from megavit.train.tensorfile import Entry, write_tensors
from megavit.train.zero_state import MOMENTS, Slice, ZeroState

_RNG = "rng"


class Saved(NamedTuple):
    """The end of one save. `error` is empty if it was committed; `stall_s` is how long training was held
    up."""

    step: int
    folder: Path
    error: str
    bytes: int
    stall_s: float
    write_s: float


class Progress(NamedTuple):
    """Of this rank's file: bytes written, bytes in all, seconds since training went on."""

    bytes: int
    total_bytes: int
    elapsed_s: float


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
        self._config, self._mesh, self._state = config, mesh, state
        self._thread: threading.Thread | None = None
        self._finished: list[Saved] = []
        self._buffer = torch.empty(0)
        self._total_bytes = self._written_bytes = 0
        self._started = 0.0
        self.committed_step = committed_step  # of the newest checkpoint

    def save(self, step: int, fields: dict[str, Any]) -> None:
        """Begin to save the state after `step` updates; `fields` are the manifest's state, run and ds_config.

        Waits for an earlier save first. Returns once training may go on; `finished` tells the end. Does
        nothing if this step has been saved.
        """
        started = time.perf_counter()
        self.wait()
        if step == self.committed_step:
            return
        # One slice after the other in memory, kind by kind, as they will lie in the file.
        slices = list(self._state.owned())
        entries, tensors = _arrange(slices)
        buffer = self._copy_to_host(tensors)
        generators = _generator_state(self._mesh.device)
        entries[_RNG] = Entry("U8", generators.shape)  # last: the numbers before it stay aligned
        optimizer = self._state.optimizer_state()
        layouts = {name: layout_of(parameter) for name, parameter in self._state.named_parameters()}
        self._total_bytes, self._written_bytes = sum(entry.num_bytes for entry in entries.values()), 0
        self._started = time.perf_counter()
        stall_s = self._started - started
        arguments = (step, fields, slices, entries, [buffer, generators], optimizer, layouts, stall_s)
        # A daemon: a rank that ends with an error must not wait for the others' files.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.async_save:
            self.wait()

    def finished(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        done, self._finished = self._finished, []
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
        return Progress(self._written_bytes, self._total_bytes, time.perf_counter() - self._started)

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

    def _write(
        self,
        step: int,
        fields: dict[str, Any],
        slices: list[Slice],
        entries: dict[str, Entry],
        data: list[np.ndarray],
        optimizer: dict[str, Any],
        layouts: dict[str, Layout],
        stall_s: float,
    ) -> None:
        """In the thread: write this rank's file, agree, commit."""
        mesh = self._mesh
        partial = checkpoint.partial_folder(self.folder, step)
        name = f"rank_{mesh.global_rank:05d}.safetensors"
        report = _Report(None, optimizer["steps"], "")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            metadata = {"step": str(step), "tp_rank": str(mesh.tp_rank), "tp_size": str(mesh.tp_size)}
            written = write_tensors(partial / name, entries, data, metadata, self._count)
            places = {part.name: (part.start, part.stop) for part in slices}
            report = report._replace(file=RankFile(name, *written, mesh.tp_rank, places))
        except OSError as error:
            report = report._replace(error=f"rank {mesh.global_rank}: {error}")
        reports: list[_Report] = mesh.gather_for_io(report)
        error, size = "", 0
        if mesh.is_main:
            error = "; ".join(report.error for report in reports if report.error)
            files = [report.file for report in reports if report.file]
            size = sum(file.bytes for file in files)
            steps = {name: count for report in reports for name, count in report.steps.items()}
            optimizer |= {"steps": steps}
            error = error or self._commit(step, partial, files, optimizer, layouts, fields)
            if error:
                shutil.rmtree(partial, ignore_errors=True)
        error, size = mesh.broadcast_for_io((error, size))
        if not error:
            self.committed_step = step
        final = self.folder / checkpoint.folder_name(step)
        self._finished.append(Saved(step, final, error, size, stall_s, time.perf_counter() - self._started))

    def _count(self, num_bytes: int) -> None:
        self._written_bytes += num_bytes

    def _commit(
        self,
        step: int,
        partial: Path,
        files: list[RankFile],
        optimizer: dict[str, Any],
        layouts: dict[str, Layout],
        fields: dict[str, Any],
    ) -> str:
        """On the main rank: make the checkpoint count, and delete those that are no longer kept. An error's
        text, or nothing."""
        final = self.folder / checkpoint.folder_name(step)
        described = Checkpoint(
            folder=final,
            step=step,
            tp_size=self._mesh.tp_size,
            dp_size=self._mesh.dp_size,
            kinds=(WEIGHT, *MOMENTS),
            layouts=layouts,
            files=tuple(files),
            optimizer=optimizer,
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **fields,
        )
        described.check_tiling()
        try:
            checkpoint.commit(partial, final, described.manifest())
            checkpoint.prune(self.folder, self._config.keep, self._config.keep_every)
        except OSError as error:
            return f"main rank: {error}"
        return ""


def open_latest(run_dir: Path, on_damage: str, mesh: Mesh, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from, every byte of it verified by some rank; None in a new run folder.

    With `on_damage` "previous" a damaged one is set aside (renamed to *.damaged) and the one before it is
    taken. Raises CheckpointError, naming the damaged files, on every rank. Collective over the world.
    """
    mesh.on_main(lambda: checkpoint.clean(checkpoint.checkpoints_of(run_dir)))
    while True:
        found, problems = mesh.on_main(lambda: _open(run_dir))
        if found:
            mine = found.files[mesh.global_rank :: mesh.world_size]
            problems = [problem for some in mesh.gather(found.damage(mine)) for problem in some]
        if not problems:
            return found
        if on_damage == "stop":
            advice = "restore it, or go on from the one before it with --checkpoint.on_damage previous"
            raise CheckpointError("\n".join([*problems, advice]))
        for problem in problems:
            say(f"note: {problem}")
        named = mesh.on_main(lambda: checkpoint.set_aside_latest(run_dir))
        say(f"note: going on from the checkpoint before it, {named}")


def _open(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint, or what is wrong with it."""
    try:
        path = checkpoint.find_latest(run_dir)
        return (Checkpoint.open(path) if path else None), []
    except CheckpointError as error:
        return None, [str(error)]


def restore(source: Checkpoint, state: ZeroState, mesh: Mesh) -> None:
    """Copy weights, moments and update counts into the engine's own buffers, reading this rank's boxes only.
    Collective over DP."""
    state.load(source.read, moments=True)
    state.set_steps(source.optimizer["steps"])
    if (source.tp_size, source.dp_size) == (mesh.tp_size, mesh.dp_size):
        saved = source.rank_state(source.files[mesh.global_rank], _RNG)
        _set_generator_state(saved, mesh.device)
    source.close()


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
