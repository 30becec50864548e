"""A hang ends, with a report; progress does not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from megavit.train.watchdog import HANG_EXIT_STATUS, Watchdog

# Its seconds pass when the program says so, and the watchdog has looked at each of them.
HANG = """
import time
from types import SimpleNamespace
from megavit.train import watchdog as module
now, looks = 0.0, 0
def clock():
    global looks
    looks += 1
    return now
module.time = SimpleNamespace(monotonic=clock)
watchdog = module.Watchdog(1.0, "rank 7", lambda: "data worker 12 last read sample 3 of x.tar")
for _ in range(3):
    watchdog.at("computing step 4")
    now += 0.9
    before = looks
    while looks < before + 2:
        time.sleep(0.01)
print("made progress", flush=True)
def stuck():
    global now
    now += 1.0
    time.sleep(600)
stuck()
"""


def test_a_hang_prints_the_stacks_and_ends_the_process() -> None:
    """Catches a hang that lasts, a report without rank, phase, data or stack, and one that comes too
    early."""
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=600)
    assert done.returncode == HANG_EXIT_STATUS and done.stdout == "made progress\n", done.stderr
    for words in ("rank 7: no progress for", "while computing step 4", "sample 3 of x.tar", "in stuck"):
        assert words in done.stderr, done.stderr


def test_heartbeats_and_a_stopped_watchdog() -> None:
    """Catches heartbeats that stop with the work, and a watchdog that outlives its run."""
    beats: list[tuple[str, float]] = []
    watchdog = Watchdog(600, "rank 0", heartbeat=lambda *beat: beats.append(beat), heartbeat_s=0.1)
    watchdog.at("evaluating")
    deadline = time.monotonic() + 60
    while not beats and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.stop()
    assert beats and beats[0][0] == "evaluating"
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "watchdog")
    thread.join(60)
    assert not thread.is_alive()
