"""Decoding processes that die or hang: an error that names what they were reading, instead of silence."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import TypeVar

from torch.utils.data import get_worker_info

_RECORD = 2048  # bytes a worker

T = TypeVar("T")


class WorkerError(ValueError):
    """A decoding process died or gave no batch in time; the message names what it was reading."""


class WorkerLog:
    """One record a worker process, in a small file that all map: its pid and the sample that it is reading.

    Written before each sample is touched, without a system call, so it outlives even SIGKILL. Callable as the
    DataLoader's `worker_init_fn`. The file goes when the creating object does.
    """

    def __init__(self, workers: int):
        self._file = tempfile.NamedTemporaryFile(prefix="megavit-workers-")  # noqa: SIM115 (lives as long as we)
        self._file.truncate(_RECORD * workers)
        self.path = Path(self._file.name)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __call__(self, worker: int) -> None:
        """In the worker: start recording what the data set's samples read."""
        info = get_worker_info()
        assert info is not None
        info.dataset.samples.record = self.record(worker)

    def record(self, worker: int) -> _Record:
        """What process number `worker` calls with each sample that it begins to read."""
        with open(self.path, "r+b") as file:
            return _Record(mmap.mmap(file.fileno(), 0), worker)

    def read(self) -> dict[int, str]:
        """pid -> last sample, of the workers that have begun."""
        found = {}
        content = self.path.read_bytes()
        for start in range(0, len(content), _RECORD):
            pid, _, sample = content[start : start + _RECORD].rstrip(b"\0").partition(b" ")
            if pid:
                found[int(pid)] = sample.decode("utf-8", "replace")
        return found


class _Record:
    def __init__(self, whole: mmap.mmap, worker: int):
        self._whole, self._start = whole, worker * _RECORD

    def __call__(self, url: str, index: int) -> None:
        text = f"{os.getpid()} sample {index} of {url}".encode()[:_RECORD]
        self._whole[self._start : self._start + _RECORD] = text.ljust(_RECORD, b"\0")


def watched(batches: Iterator[T], log: WorkerLog) -> Iterator[T]:
    """`batches` of a DataLoader; WorkerError if one of its workers died or a batch took longer than its
    timeout."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        # OSError and EOFError: the worker died while its batch was being handed over.
        if isinstance(error, RuntimeError) and ("DataLoader" not in text or "Caught" in text):
            raise
        last = log.read()
        dead = {pid: sample for pid, sample in last.items() if not _is_running(pid)}
        for pid in last.keys() - dead.keys():
            # A stuck process ignores the polite signals, and Python would wait for it at its exit.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cause = (
            "was ended from outside (out of memory?)" if dead else "gave no batch in time (--data.timeout_s)"
        )
        what = "; ".join(f"worker {pid} was reading {sample}" for pid, sample in (dead or last).items())
        raise WorkerError(
            f"a data worker {cause}: {what or 'none had begun to read'}. {text.partition(chr(10))[0]}"
        ) from error


def start_forkserver() -> None:
    """Start the process that data workers are forked from, with the stop signals blocked in it and in them.

    A launcher's signal goes to all processes of the job, and the workers must go on until the training
    process has saved.
    """
    atexit.register(_end_workers)
    resource_tracker.ensure_running()  # starting it would unblock SIGTERM again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    """multiprocessing asks its daemons politely at exit, and would wait for ever for one that hangs."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
