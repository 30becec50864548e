"""Timing by alternating rounds, and the ratios within a round.

On a shared machine absolute times mean little. Ways that are timed one right after the other, in an order
that turns, share whatever else the machine does, so their ratios mean more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from megavit.bench.report import Row


def clock_of(device: str) -> Callable[[], float]:
    """Seconds that a device has worked: the process's CPU time, or wall time after synchronising a GPU."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def rounds(
    ways: dict[str, Callable[[], None]], count: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each way in `count` rounds, by `clock`. The order turns by one each round; one round before
    them is not counted."""
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


def ratio_to(base: str, seconds: dict[str, list[float]], name: str) -> Row:
    """How many times faster than `base` the way `name` is, as columns: median, lowest and highest of the
    ratios within a round."""
    ratios = [a / b for a, b in zip(seconds[base], seconds[name], strict=True)]
    return {
        "ratio_to": base,
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def median_s(step: Callable[[], object], count: int, device: str) -> float:
    """Median seconds of a step, of `count` after one that is not counted."""
    clock = clock_of(device)
    seconds = []
    for _ in range(count + 1):
        started = clock()
        step()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def kernel_s(call: Callable[[], object], least_s: float, device: str) -> float:
    """Seconds of a short call: the median of five timings, each of as many calls in a row as fill `least_s`,
    so that neither the start nor the end of a GPU's queue counts."""
    clock = clock_of(device)

    def timed(times: int) -> float:
        started = clock()
        for _ in range(times):
            call()
        return (clock() - started) / times

    timed(1)
    times = max(1, int(least_s / max(timed(1), 1e-9)))
    return statistics.median(timed(times) for _ in range(5))
