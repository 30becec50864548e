"""Slow reading and writing by many ranks at once, where every rank knows whether bytes still move anywhere.

A rank that has nothing left to do waits for the slowest one. Its watchdog must not take that for a hang, and
must notice when the slowest one hangs: so the ranks exchange what they have moved, from threads that do not
touch the disk themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from megavit.parallel.mesh import Mesh

_ROUND_S = 2.0

T = TypeVar("T")


def run_together(
    mesh: Mesh, work: Callable[[Callable[[int], None]], T], moved: Callable[[int], None] | None = None
) -> T:
    """Run `work(count)` in a thread, on every rank, until the last rank's has ended; return what it returned
    here, or raise what it raised.

    `work` tells `count` the number of bytes of each piece that it has read or written. `moved` is told the
    sum over all ranks whenever it has grown. Collective over the world, on the mesh's `io_group`:
    RuntimeError when a rank is lost.
    """
    mine = 0
    outcome: Any = None
    error: Exception | None = None

    def count(num_bytes: int) -> None:
        nonlocal mine
        mine += num_bytes

    def run() -> None:
        nonlocal outcome, error
        try:
            outcome = work(count)
        except Exception as caught:  # of any kind: it is raised again below, when the other ranks are done
            error = caught

    thread = threading.Thread(target=run, name="shared I/O", daemon=True)
    thread.start()
    before, working = 0, 1
    while working:
        thread.join(_ROUND_S)
        total, working = mesh.sum_for_io(mine, int(thread.is_alive()))
        if moved and total > before:
            moved(total)
        before = total
    if error is not None:
        raise error
    return outcome
