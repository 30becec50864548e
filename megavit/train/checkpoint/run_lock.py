"""One job at a time on a run folder: two would mix their logs and replace each other's checkpoints.

The main rank holds a POSIX lock on `run.lock` in the run folder. The kernel, or the file server, frees it
when the process ends, however it ends; child processes do not inherit it. It works between hosts where the
file system carries such locks: NFSv4, NFSv3 with lockd, Lustre mounted with `flock`, GPFS, CephFS, BeeGFS
with `tuneUseGlobalFileLocks`. Its limits: with Lustre's `localflock` it sees the jobs of one host only; a
host that dies keeps its lock until the server notices (NFSv4: when its lease ends, 90 s as a rule); and on a
file system without locks there is only a note.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

LOCK_FILE = "run.lock"
_WAIT_S = 30.0  # for a job that is just ending, as that of a requeued one may be
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class RunInUse(ValueError):
    """Another job uses the run folder; the message names the folder and that job."""


class RunLock:
    """The right to write into `run_dir`. `say` is told when it waits, and when there can be no lock.

    Within one process a second lock on the same folder is granted, and its release releases the first.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        self._run_dir, self._say = run_dir, say
        self._file: int | None = None

    def acquire(self) -> None:
        """Make the folder if need be and take the lock. RunInUse if another job still holds it after half a
        minute, OSError if the folder cannot be written."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + _WAIT_S
        waits = False
        while not self._try():
            holder = os.pread(self._file, 1000, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() >= deadline:
                os.close(self._file)
                self._file = None
                raise RunInUse(
                    f"the run folder {self._run_dir} is in use by {holder}; wait until that job has ended or "
                    f"end it, or choose another --run_dir"
                )
            if not waits:
                self._say(f"note: waiting up to {_WAIT_S:.0f} s for {self._run_dir}, in use by {holder}")
            waits = True
            time.sleep(0.2)

    def release(self) -> None:
        """Give the folder back, if this process has it. The file stays: removing it would let two jobs in.

        Only when nothing of this process writes any more; otherwise its end frees the folder."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def _try(self) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self._say(
                f"note: the file system of {self._run_dir} has no locks ({error.strerror}), so nothing keeps "
                f"a second job from using the run folder at the same time"
            )
            return True
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)
        os.fsync(self._file)  # for readers on other hosts
        return True
