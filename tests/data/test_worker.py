"""Data workers live as long as the process that they work for, and no longer."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megavit.data.worker import CHECK_S, WorkerError, end_with_parent
from tests.data.shards import reading_hangs, write_shards
from tests.data.test_loader import train_loader
from tests.processes import descendants, is_running

ROOT = Path(__file__).parents[2]
GONE_S = 60  # they take one or two

pytestmark = pytest.mark.slow

# A program with two data workers: takes a batch at each line that it is sent, and ends at an empty one.
PROGRAM = """
import os, sys, time
from tests.data.test_loader import train_loader
loader = train_loader(sys.argv[1], workers=2)
batches = loader.batches(0, 10_000)
while len(loader.reading().splitlines()) < 2:  # both have begun
    time.sleep(0.01)
print("ready", flush=True)
for line in sys.stdin:
    if line == "exit 70\\n":
        os._exit(70)  # as the watchdog does
    if not line.strip():
        break
    for _ in range(40):
        next(batches)
    print("ready", flush=True)
"""


# Indexing and checking shards share work among processes too.
POOL = """
import time
from megavit.data.manifest import in_processes
results = in_processes(time.sleep, [0, 0, 600, 600], 2, "sleeping")
next(results), next(results)  # both have begun
print("ready", flush=True)
next(results)
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path)
    return tmp_path


class Program:
    """The program above, or another; `below` are the processes that it has started."""

    def __init__(self, code: str, *arguments: str):
        command = [sys.executable, "-c", code, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
        self.wait_until_ready()
        self.below = descendants(self.process.pid)

    def wait_until_ready(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def left(self) -> list[int]:
        """What is still there of the processes below, some time after the program's end."""
        self.process.wait(timeout=GONE_S)
        deadline = time.monotonic() + GONE_S
        while time.monotonic() < deadline and any(map(is_running, self.below)):
            time.sleep(0.02)
        left = [pid for pid in self.below if is_running(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left


@pytest.mark.parametrize(
    ("end", "hangs"), [("SIGKILL", False), ("SIGKILL", True), ("exit 70", True), ("normal", True)]
)
def test_all_processes_end_with_the_one_that_they_work_for(shards: Path, end: str, hangs: bool) -> None:
    """Catches data workers, and with them the forkserver and the resource tracker, that outlive a rank."""
    with reading_hangs(shards.glob("*.tar") if hangs else []):
        program = Program(PROGRAM, str(shards / "x.manifest.json"))
        assert len(program.below) >= 4  # tracker, forkserver, two workers
        if end == "SIGKILL":
            program.process.kill()
        else:
            program.say(end if end == "exit 70" else "")
        assert program.left() == []


def test_the_processes_of_a_killed_index_or_check_end_too() -> None:
    program = Program(POOL)
    assert len(program.below) >= 4
    program.process.kill()
    assert program.left() == []


def test_stop_signals_leave_them_alone_and_they_start_with_their_imports_done(shards: Path) -> None:
    """Catches a launcher's signal that ends workers or their helpers before the training process has saved,
    and workers that each load torch, which takes seconds and memory at every evaluation."""
    program = Program(PROGRAM, str(shards / "x.manifest.json"))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for pid in program.below:
            os.kill(pid, number)
    program.say("go on")
    program.wait_until_ready()
    assert all(map(is_running, program.below))
    (forkserver,) = [pid for pid in program.below if set(descendants(pid)) & set(program.below)]
    assert "libtorch" in Path(f"/proc/{forkserver}/maps").read_text()
    assert len(os.listdir(f"/proc/{forkserver}/task")) == 1  # forking with threads would not be safe
    program.say("")
    assert program.left() == []


def hang_in_c() -> None:
    """Let no other thread run, as a page fault does on a file system that is gone."""
    end_with_parent()
    print("ready", flush=True)
    ctypes.PyDLL(None).pause()


def learn_of_it_late(fifo: str) -> None:
    print("ready", flush=True)
    open(fifo).close()  # waits for a writer
    end_with_parent()
    signal.pause()


def start(function: str, *arguments: str) -> Program:
    """A program that starts a process with one of the functions above."""
    code = f"""
import multiprocessing, signal
from tests.data.test_worker import {function}
multiprocessing.get_context("forkserver").Process(target={function}, args={arguments}).start()
signal.pause()
"""
    return Program(code)


def test_one_that_runs_no_python_ends_as_well() -> None:
    """Catches a watch that is a Python thread."""
    program = start("hang_in_c")
    program.process.kill()
    assert program.left() == []


def test_one_that_asks_too_late_ends_as_well(tmp_path: Path) -> None:
    """Catches a worker that stays when its parent has gone while it was starting."""
    os.mkfifo(tmp_path / "fifo")
    program = start("learn_of_it_late", str(tmp_path / "fifo"))
    program.process.kill()
    program.process.wait()
    open(tmp_path / "fifo", "w").close()
    assert program.left() == []


def test_a_worker_killed_while_no_batch_is_ready_is_noticed(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that notices a dead worker only after `timeout_s`: ten minutes by default."""
    assert CHECK_S <= 10
    monkeypatch.setattr("megavit.data.loader.CHECK_S", 0.5)
    loader = train_loader(str(shards / "x.manifest.json"), workers=2, timeout_s=120.0)
    killed: list[int] = []

    def kill_one() -> None:
        while not (lines := loader.reading().splitlines()):
            time.sleep(0.01)
        killed.append(int(lines[0].split()[2]))
        os.kill(killed[0], signal.SIGKILL)

    expected = r"ended from outside.* sample \d+ of .*x-\d+\.tar"
    # The workers start after it: a file that one of them has opened already could not be made to hang.
    with reading_hangs(shards.glob("*.tar")), pytest.raises(WorkerError, match=expected) as error:
        batches = loader.batches(0, 1)
        threading.Thread(target=kill_one).start()
        next(batches)
    assert f"worker {killed[0]} " in str(error.value)
