"""A run's JSON-lines files: each line whole, or not there; none about steps that the run does again."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISCARDED_SUFFIX = ".discarded"  # lines of steps that a run did again from an earlier checkpoint


class LogFile:
    """Appends records to a JSON-lines file, from any thread. A full disk costs lines, never the run; `say`
    is told when it begins and when it ends."""

    def __init__(self, path: Path, first_step: int, say: Callable[[str], None]):
        """Goes on with the file; what it holds about steps after `first_step` is set aside."""
        self._path, self._say = path, say
        self._lock = threading.Lock()
        self._lost = 0
        self._file = self._open(first_step)

    def write(self, **fields: Any) -> None:
        """Append a record. Numbers that JSON does not know (NaN, infinity) become null."""
        line = json.dumps({key: _finite(value) for key, value in fields.items()}).encode() + b"\n"
        with self._lock:
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError("the disk took a part of the line only")
            except OSError as error:
                self._file.truncate(end)
                self._lost += 1
                if self._lost == 1:
                    self._say(
                        f"note: {self._path.name} cannot be written, its lines are left out for now: {error}"
                    )
            else:
                if self._lost:
                    self._say(
                        f"note: {self._path.name} can be written again; {self._lost} lines were left out"
                    )
                self._lost = 0

    def rewind(self, step: int) -> None:
        """Set aside what was written about steps after `step`."""
        with self._lock:
            self._file.close()
            self._file = self._open(step)

    def close(self) -> None:
        self._file.close()

    def _open(self, step: int) -> Any:
        discard_rows(self._path, step)
        return open(self._path, "ab", buffering=0)


def discard_rows(path: Path, step: int) -> None:
    """Move the lines of a JSON-lines file that are about steps after `step` to `<name>.discarded`: they will
    be done again. What is no whole record (a line that was cut off by a kill, or damaged) goes there too."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept: list[bytes] = []
    discarded: list[bytes] = []
    for line in lines:
        (kept if _is_about_the_past(line, step) else discarded).append(line)
    if not discarded:
        return
    with open(path.with_name(path.name + DISCARDED_SUFFIX), "ab") as file:
        file.writelines(line.rstrip(b"\r\n") + b"\n" for line in discarded)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def _is_about_the_past(line: bytes, step: int) -> bool:
    """Whether this is a whole record of `step`, of one before, or of none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    about = record.get("step", 0) if type(record) is dict else None
    return line.endswith(b"\n") and isinstance(about, int | float) and about <= step


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
