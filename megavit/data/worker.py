"""Decoding processes: started fast, gone with their parent, and an error that names what they were reading,
instead of silence, when they die or hang.

Imports nothing heavy, so that `start_forkserver` can come before the imports that it is to run beside.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, TypeVar

CHECK_S = 5.0  # how long a DataLoader waits before it looks whether its workers are alive
_PRELOAD = "megavit.data.loader"  # all that workers need
_MAX_SAMPLE = 2048  # bytes of a sample's description that are kept

T = TypeVar("T")


class WorkerError(ValueError):
    """A decoding process died or gave no batch in time; the message names what it was reading."""


class _Record(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_int), ("sample", ctypes.c_char * _MAX_SAMPLE)]


class WorkerLog:
    """One record a worker process, in memory that all share: its pid and the sample that it is reading.

    Written before each sample is touched, without a system call, so it outlives even SIGKILL. Callable as the
    DataLoader's `worker_init_fn`.
    """

    def __init__(self, workers: int):
        self._records = RawArray(_Record, workers)

    def __call__(self, worker: int) -> None:
        """In the worker: end with the parent, and record what the data set's samples read."""
        from torch.utils.data import get_worker_info

        end_with_parent()
        info = get_worker_info()
        assert info is not None
        items: Any = info.dataset
        items.samples.record = self.record(worker)

    def record(self, worker: int) -> Callable[[str, int], None]:
        """What process number `worker` calls with each sample that it begins to read."""
        mine = self._records[worker]

        def record(url: str, index: int) -> None:
            mine.sample = f"sample {index} of {url}".encode()[:_MAX_SAMPLE]
            mine.pid = os.getpid()

        return record

    def read(self) -> dict[int, str]:
        """pid -> last sample, of the workers that have begun."""
        return {one.pid: one.sample.decode("utf-8", "replace") for one in self._records if one.pid}


def watched(batches: Iterator[T], log: WorkerLog, timeout_s: float) -> Iterator[T]:
    """`batches` of a DataLoader with a timeout of CHECK_S; WorkerError if one of its workers died or a batch
    took longer than `timeout_s`.

    The DataLoader itself looks for dead workers only when its timeout is over, and can be asked again then.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error)
            # OSError and EOFError: the worker died while its batch was being handed over.
            if isinstance(error, RuntimeError) and ("DataLoader" not in text or "Caught" in text):
                raise
            late = "timed out" in text
            if late and time.monotonic() < deadline:
                continue
            raise WorkerError(_describe(log, late, text.partition("\n")[0])) from error
        if batch is None:
            return
        yield batch
        deadline = time.monotonic() + timeout_s


def _describe(log: WorkerLog, late: bool, text: str) -> str:
    last = log.read()
    dead = {pid: sample for pid, sample in last.items() if not _is_running(pid)}
    for pid in last.keys() - dead.keys():
        # A stuck process ignores the polite signals, and Python would wait for it at its exit.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cause = "gave no batch in time (--data.timeout_s)" if late else "was ended from outside (out of memory?)"
    what = "; ".join(f"worker {pid} was reading {sample}" for pid, sample in (dead or last).items())
    return f"a data worker {cause}: {what or 'none had begun to read'}. {text}"


def start_forkserver() -> None:
    """Start the process that data workers are forked from, unless it runs, and return at once.

    It imports what they need, once: a worker that does so itself takes seconds to start, at every evaluation,
    and 290 MB of memory of its own.

    The stop signals are blocked in it and in them: a launcher's signal goes to all processes of the job, and
    the workers must go on until the training process has saved.
    """
    atexit.unregister(_end_workers)  # once, however many loaders there are
    atexit.register(_end_workers)
    server: Any = forkserver._forkserver
    modules = server._preload_modules  # the program may have set some, for processes of its own
    if _PRELOAD not in modules:
        forkserver.set_forkserver_preload([*modules, _PRELOAD])
    stop_signals = (signal.SIGUSR1, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        resource_tracker.ensure_running()  # has its own way with SIGTERM, and leaves it unblocked here
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a process of the forkserver: let the kernel kill it when the process that asked for it is gone.

    Its parent by process id is the forkserver, which in turn ends after its last child and its last client.
    What tells is the pipe that multiprocessing leaves between the process and the one that asked for it, who
    alone has the other end. The kernel's signal also reaches a process that hangs in a read, or in a page
    fault while it has the interpreter's lock.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.wait([pipe], 0):  # it was gone before
        os._exit(1)


def _end_workers() -> None:
    """multiprocessing asks its daemons politely at exit, and would wait for ever for one that hangs."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
