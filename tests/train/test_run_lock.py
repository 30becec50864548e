"""One job at a time on a run folder; a job that has ended, however, is not in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import run_lock
from megavit.train.checkpoint.run_lock import RunInUse, RunLock
from tests.train.runs import ds_config, small_run
from tests.train.saving import save_steps

HOLDER = """
import os, pathlib, subprocess, sys
from megavit.train.checkpoint.run_lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]), print)
lock.acquire()
children = [subprocess.Popen(["sleep", "600"]).pid, os.fork()]
if children[1] == 0:
    os.execvp("sleep", ["sleep", "600"])
print(*children, flush=True)
sys.stdin.read()
lock.release()
sys.stdin = open("/dev/null")
print("released", flush=True)
"""


@contextmanager
def held(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another job that uses the folder, until its input is closed; its child processes live longer."""
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout and job.stdin
    children = [int(word) for word in job.stdout.readline().split()]
    try:
        yield job
    finally:
        job.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        job.stdin.close()
        job.stdout.close()
        job.wait()


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.5)


@pytest.mark.usefixtures("short_wait")
def test_a_second_job_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    """Catches two jobs that mix their logs, and a refusal that does not say whom to look for."""
    said: list[str] = []
    with held(tmp_path / "run") as job, pytest.raises(RunInUse) as caught:
        RunLock(tmp_path / "run", said.append).acquire()
    message = str(caught.value)
    for words in (str(tmp_path / "run"), f"process {job.pid} on {os.uname().nodename} since 20", "--run_dir"):
        assert words in message, message
    assert "\n" not in message
    assert len(said) == 1 and "waiting up to" in said[0] and f"process {job.pid}" in said[0]


def test_a_killed_job_is_not_in_the_way(tmp_path: Path) -> None:
    """Catches a lock that outlives its job, in the child processes that it has left behind for instance."""
    said: list[str] = []
    with held(tmp_path) as job:
        job.kill()
        job.wait()
        lock = RunLock(tmp_path, said.append)
        lock.acquire()
    assert said == [] and f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()
    lock.release()
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_job_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """Catches a requeued job that fails because its predecessor has not quite ended."""
    waiting = threading.Event()
    with held(tmp_path) as job:
        stdin = job.stdin
        assert stdin
        ender = threading.Thread(target=lambda: waiting.wait(30) and stdin.close())
        ender.start()
        lock = RunLock(tmp_path, lambda _: waiting.set())
        lock.acquire()
        ender.join()
    assert waiting.is_set()
    lock.release()


def test_a_file_system_without_locks_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that cannot start there, and other errors that are taken for a missing lock."""
    said: list[str] = []

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    number = errno.ENOLCK
    lock = RunLock(tmp_path, said.append)
    lock.acquire()
    lock.release()
    assert len(said) == 1 and "has no locks (No locks available)" in said[0]
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path, said.append).acquire()


@pytest.mark.slow
@pytest.mark.usefixtures("short_wait")
def test_the_trainer_asks_before_it_touches_anything(tmp_path: Path) -> None:
    """Catches a second job that cleans or writes before it is refused."""
    from megavit.train.loop import Trainer

    run_dir = tmp_path / "run"
    save_steps(run_dir, 4)
    (run_dir / "checkpoints" / "step_00000008.partial").mkdir()  # the first job is saving
    run = small_run(tmp_path / "no data", run_dir)
    with held(run_dir):
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        with pytest.raises(RunInUse):
            Trainer(run, ds_config(3), Mesh.single())
        assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    with pytest.raises(ValueError):  # free again; this is another run
        Trainer(run, ds_config(3), Mesh.single())
    assert not (run_dir / "checkpoints" / "step_00000008.partial").exists()
