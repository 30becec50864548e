"""Timing by alternating rounds, the ratios within a round, and the tables that come of it.

On a shared machine absolute times mean little; ways that are timed one right after the other, in an order
that turns, share whatever else goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


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


class Report:
    """Tables as they come: printed, and both files written anew each time, so that a run that is ended early
    leaves what it has."""

    def __init__(self, title: str, markdown: Path | None, json_file: Path | None):
        self._lines: list[str] = []
        self._data: dict[str, Any] = {"title": title, "tables": []}
        self._markdown, self._json = markdown, json_file
        self.add(title)

    def add(self, *lines: str, data: dict[str, Any] | None = None) -> None:
        """Lines for people, and the same as `data` for programs."""
        self._lines += lines
        if lines:
            print("\n".join(lines), flush=True)
        if data is not None:
            self._data["tables"].append(data)
        if self._markdown:
            self._markdown.write_text("\n".join(self._lines) + "\n")
        if self._json:
            self._json.write_text(json.dumps(self._data, indent=2) + "\n")


def require_matplotlib() -> None:
    """ValueError, before anything is measured, where no chart can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("a chart needs matplotlib: pip install 'megavit[plot]'") from error
