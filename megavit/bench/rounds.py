"""Timing by alternating rounds, the ratios within a round, and the tables that come of it.

On a shared machine absolute times mean little; ways that are timed one right after the other, in an order
that turns, share whatever else goes on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """A median and the range around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.2f}..{self.high:.2f})"


def rounds(
    ways: dict[str, Callable[[], None]], count: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds (of `clock`: CPU time of this process) of each way in `count` rounds, the order turned by one
    each round; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(count + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = clock()
            ways[name]()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def speed_ratio(base: Sequence[float], mine: Sequence[float]) -> Spread:
    """How many times faster than `base` a way is: the ratios base / mine of each round's seconds."""
    return spread([a / b for a, b in zip(base, mine, strict=True)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
