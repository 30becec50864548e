"""Saves that fail, that take long, and that nobody finishes, on real ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavit.train.checkpoint import tensorfile
from megavit.train.checkpoint.folder import committed, find_latest
from megavit.train.checkpoint.tensorfile import Entry, write_tensors
from megavit.train.config import RunConfig
from megavit.train.watchdog import HANG_EXIT_STATUS
from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, train_here
from tests.train.saving import RUN, ModelState, fields_of, saver_of


def fail_in_turn(run_dir: Path) -> list[tuple[int, str, int]]:
    """In a rank: six saves, of which the middle four fail for different reasons; what this rank is told, and
    its newest committed step."""
    from megavit.parallel.mesh import Mesh
    from megavit.train.checkpoint import saver as module

    mesh = Mesh.from_environment(1)
    state = ModelState(RUN, mesh)
    saver = saver_of(run_dir, state, mesh)

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError("no room for a page-locked buffer")

    def broken(*_: Any) -> Any:
        raise AssertionError("sizes do not match")

    told = []
    for step in range(1, 7):
        fields = fields_of(RUN, step)
        with pytest.MonkeyPatch.context() as patch:
            if step == 2 and mesh.global_rank == 1:
                patch.setattr(module, "write_tensors", broken)
            if step == 5 or (step == 3 and mesh.global_rank == 1):
                patch.setattr(state, "owned", out_of_memory)
            if step == 4 and mesh.is_main:
                fields["state"] = {"an object that JSON does not know": object()}
            saver.save(step, fields)
            assert saver.wait(120)
        told += [(saved.step, saved.error, saver.committed_step) for saved in saver.finished()]
    return told


@pytest.mark.dist
@pytest.mark.slow
def test_whatever_fails_is_a_failed_save_on_every_rank(tmp_path: Path) -> None:
    """Catches an exception that ends one rank's thread, so that the others wait for it, and a reason that
    only one rank knows."""
    first, second = run_ranks(2, fail_in_turn, tmp_path)
    assert first == second
    steps, errors, newest = zip(*first, strict=True)
    assert steps == (1, 2, 3, 4, 5, 6) and newest == (1, 1, 1, 1, 1, 6)
    assert errors[0] == errors[5] == ""
    assert errors[1] == "rank 1: AssertionError: sizes do not match"
    assert errors[2] == "rank 1: MemoryError: no room for a page-locked buffer"
    assert errors[3].startswith("main rank: TypeError: ") and "not JSON serializable" in errors[3]
    assert errors[4].count("MemoryError") == 2 and "rank 0: " in errors[4] and "rank 1: " in errors[4]
    assert [path.name for path in committed(tmp_path / "checkpoints")] == ["step_00000001", "step_00000006"]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def lose_a_rank(run_dir: Path) -> str:
    """In a rank: a save during which rank 1 ends; what the other's next call says."""
    from megavit.parallel.mesh import Mesh
    from megavit.train.checkpoint import saver as module

    mesh = Mesh.from_environment(1)
    saver = saver_of(run_dir, mesh=mesh)
    saver.save(1, fields_of(RUN, 1))
    assert saver.wait(120) and saver.finished()
    if not mesh.is_main:
        module.write_tensors = lambda *_: time.sleep(600)
    saver.save(2, fields_of(RUN, 2))
    if not mesh.is_main:
        return ""
    assert saver.wait(120)
    for call in (saver.finished, lambda: saver.save(3, fields_of(RUN, 3))):
        with pytest.raises(module.SaveError) as caught:
            call()
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.slow
def test_a_lost_rank_ends_the_others(tmp_path: Path) -> None:
    """Catches a rank that waits for ever for the agreement of one that is gone, or that trains on unsaved."""
    said, _ = run_ranks(2, lose_a_rank, tmp_path, fresh=True)
    assert "can no longer agree" in said and "RuntimeError: " in said and "is that of step 1" in said, said
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == "step_00000001"


def train_on_a_slow_disk(run: RunConfig, raw: dict[str, Any]) -> str:
    """In a rank: a run in which rank 1 writes its part of the checkpoint, and rank 0 the export, for as long
    as the other's watchdog has not heard of it a few times."""
    from megavit.train import loop
    from megavit.train.checkpoint import export, saver, shared_io

    rank = int(os.environ["RANK"])
    heard = [Path(run.run_dir).parent / f"heard-{number}" for number in range(2)]
    heard[rank].touch()
    shared_io._ROUND_S = 0.05
    at, write = loop.Watchdog.at, write_tensors

    def note(watchdog: Any, phase: str) -> None:
        at(watchdog, phase)
        if phase.startswith(("saving, after", "exporting")):
            with open(heard[rank], "a") as file:
                file.write(f"{phase}\n")

    def slow(path: Path, entries: Any, data: Any, metadata: Any, progress: Callable[[int], None]) -> Any:
        other, deadline = heard[1 - rank], time.monotonic() + 100
        before = other.stat().st_size
        while other.stat().st_size < before + 60:  # three or four lines
            progress(1)
            time.sleep(0.02)
            assert time.monotonic() < deadline, f"rank {1 - rank} has heard: {other.read_text()}"
        return write(path, entries, data, metadata, progress)

    loop.Watchdog.at = note
    if rank == 1:
        saver.write_tensors = slow
    else:
        export.write_tensors = slow
    return train_here(run, raw)


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_wait_for_the_slowest_know_that_it_writes(digits: Path, tmp_path: Path) -> None:
    """Catches a watchdog that ends a finished run, because another rank still saves or exports."""
    run = small_run(digits, tmp_path / "run", max_steps=2)
    assert run_ranks(2, train_on_a_slow_disk, run, ds_config(3), fresh=True) == ["", ""]
    saved = [row for row in log_of(tmp_path / "run") if row.get("event") == "saved"]
    assert [row["step"] for row in saved] == [2]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def train_on_a_disk_that_hangs(run: RunConfig, raw: dict[str, Any], report: Path) -> None:
    """In a rank: a run whose first file is never written; what it says goes to `report`."""
    from megavit.train import loop
    from megavit.train.checkpoint import saver

    os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
    watchdogs, at = [], loop.Watchdog.at

    def remember(watchdog: Any, phase: str) -> None:
        watchdogs.append(watchdog)
        at(watchdog, phase)

    def hang(*_: Any) -> None:
        watchdogs[0]._timeout_s = 1.0
        time.sleep(600)

    loop.Watchdog.at = remember
    saver.write_tensors = hang
    train_here(run, raw)


@pytest.mark.dist
@pytest.mark.slow
def test_a_disk_that_hangs_ends_the_run_with_a_report(digits: Path, tmp_path: Path) -> None:
    """Catches a rank that tells its watchdog of progress although no byte moves anywhere."""
    run, report = small_run(digits, tmp_path / "run", max_steps=2), tmp_path / "report"
    with pytest.raises(AssertionError, match=f"ended with {HANG_EXIT_STATUS}"):
        run_ranks(1, train_on_a_disk_that_hangs, run, ds_config(3), report, fresh=True)
    said = report.read_text()
    assert "no progress for" in said and "while waiting for a checkpoint to be written" in said
    assert "in hang" in said


def test_little_waits_in_memory_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is written into memory at once and then flushed for minutes without a sign of
    life."""
    import numpy as np

    monkeypatch.setattr(tensorfile, "_CHUNK", 100)
    monkeypatch.setattr(tensorfile, "_FLUSH_BYTES", 1000)
    told, waiting, flush = [0], [], os.fsync

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        waiting.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    data = np.arange(2500, dtype=np.float32)
    write_tensors(
        tmp_path / "x", {"x": Entry("F32", data.shape)}, [data], {}, lambda n: told.append(told[-1] + n)
    )
    size = (tmp_path / "x").stat().st_size
    assert told[-1] == size == waiting[-1] and len(told) > 100
    gaps = [after - before for before, after in zip([0, *waiting], waiting, strict=False)]
    assert max(gaps) <= 1100
