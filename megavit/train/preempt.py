"""The request to stop: SIGUSR1 (SLURM's notice) or SIGTERM sets a flag, which the loop reads between two
steps.

Imports nothing heavy, so that the handlers stand before torch is loaded.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Written into the run folder by a run that stopped on request: the batch script starts it again.
PREEMPTED_FILE = "PREEMPTED"
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop, and by which signal; `install` makes it listen."""

    def __init__(self) -> None:
        self.signal_name = ""

    def install(self) -> StopRequest:
        """Take over SIGUSR1 and SIGTERM. Main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Child processes started inside ignore the stop signals; here they wait until the end.

    Launchers signal whole process groups, and a compiler or a data worker that dies of it takes the run down
    before it could save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
