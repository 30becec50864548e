"""A stage of the hour: cases that are measured one after the other, each a row.

Whatever one case runs into (a lack of memory, a kernel or a package that is missing) is the `error` of its
row, and the next case runs. A stage looks at the clock between cases and names those that it leaves out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megavit.bench.gpu.setting import Setting
from megavit.bench.report import Report, Row

_MOST_CHARACTERS = 200  # of an error


class Case(NamedTuple):
    """What is measured: the columns that name it, and the function that gives the others."""

    names: Row
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Stage:
    """`cases` lists them, the most valuable first, without measuring anything yet. After `limit_s` seconds no
    further one is begun."""

    name: str
    answers: str
    limit_s: float
    cases: Callable[[Setting], Iterable[Case]]


class Unavailable(Exception):
    """A case that cannot be measured here, with the reason."""


def run_stage(
    stage: Stage,
    setting: Setting,
    report: Report,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure every case until `limit_s` have passed, and add a row for each to the report."""
    started, reason = clock(), ""
    for names, measure in stage.cases(setting):
        if not reason and clock() - started >= limit_s:
            reason = f"left out: the {limit_s:g} s of this stage were over"
        row = {"error": reason} if reason else attempt(measure)
        report.add(names | row)
        if row["error"] and not reason and not _answers(setting.device):
            reason = "left out: the GPU has failed in the case before"


def attempt(measure: Callable[[], Row]) -> Row:
    """Its columns and no error, or an error alone. What it has allocated is free afterwards."""
    try:
        return measure() | {"error": ""}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
        return {"error": f"{kind}{lines[0]}"[:_MOST_CHARACTERS]}
    finally:
        _free_memory()


def _free_memory() -> None:
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _answers(device: str) -> bool:
    """Whether the device still works: after some errors every call of CUDA fails."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
