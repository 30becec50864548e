"""A rank that makes no progress says where it stands and ends the job, instead of burning GPU hours in
silence."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

HANG_EXIT_STATUS = 70
_GRACE_S = 30.0


class Watchdog:
    """Ends this process, with the stacks of all its threads, after `timeout_s` without a call of `at`.

    Each rank has one, so that a hang prints every rank's stacks: those that wait and the one they wait for.
    `details` adds lines to the report (what the data workers read). `heartbeat(phase, idle_s)`, if given, is
    called every `heartbeat_s` from the watching thread. A thread that holds the interpreter's lock for ever
    is noticed too, a little later, by a timer that needs no lock.
    """

    def __init__(
        self,
        timeout_s: float,
        name: str,
        details: Callable[[], str] = str,
        heartbeat: Callable[[str, float], None] | None = None,
        heartbeat_s: float = 60.0,
    ):
        self._timeout_s, self._name, self._details = timeout_s, name, details
        self._heartbeat, self._heartbeat_s = heartbeat, heartbeat_s
        self.phase, self._since = "starting", time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, phase: str) -> None:
        """Progress: what this rank begins now."""
        self.phase, self._since = phase, time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick_s = min(1.0, self._timeout_s / 4)
        beat = armed = time.monotonic()
        faulthandler.dump_traceback_later(self._timeout_s + _GRACE_S, exit=True)
        while not self._stopped.wait(tick_s):
            now = time.monotonic()
            idle_s = now - self._since
            if idle_s > self._timeout_s:
                self._end_process(idle_s)
            if now - armed > _GRACE_S / 2:
                armed = now
                faulthandler.dump_traceback_later(self._timeout_s + _GRACE_S, exit=True)
            if self._heartbeat and now - beat > self._heartbeat_s:
                beat = now
                self._heartbeat(self.phase, idle_s)

    def _end_process(self, idle_s: float) -> None:
        report = [f"{self._name}: no progress for {idle_s:.0f} s (--timeout_s) while {self.phase}."]
        report += [line for line in self._details().splitlines() if line]
        print("\n".join([*report, "Stacks:"]), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HANG_EXIT_STATUS)
