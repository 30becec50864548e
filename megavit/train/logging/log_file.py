"""A run's JSON-lines files: each line whole, or not there; none about steps that the run does again."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

DISCARDED_SUFFIX = ".discarded"  # lines of steps that a run did again from an earlier checkpoint


class LogFile:
    """Appends records to a JSON-lines file, from any thread. A full disk costs lines, never the run; `say`
    is told when it begins and when it ends. The file is there from the first record on."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._lock = threading.Lock()
        self._lost = 0
        self._file: Any = None

    def write(self, **fields: Any) -> None:
        """Append a record. Numbers that JSON does not know (NaN, infinity) become null."""
        line = json.dumps({key: _finite(value) for key, value in fields.items()}).encode() + b"\n"
        with self._lock:
            try:
                self._file = self._file or _open(self._path)
                _append(self._file, line)
            except OSError as error:
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
        """Go on after `step`: what the file says about later steps is set aside."""
        with self._lock:
            self._close()
            discard_rows(self._path, step, self._say)
            self._file = _open(self._path)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file:
            self._file.close()
        self._file = None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file, none if it does not exist. A line that is no record (cut off by a
    kill) is passed over."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def discard_rows(path: Path, step: int, say: Callable[[str], None]) -> None:
    """Move the lines of a JSON-lines file that are about steps after `step` to `<name>.discarded`: they will
    be done again. What is no whole record (a line that was cut off by a kill, or damaged) goes there too.

    On a full disk they are deleted, and `say` is told.
    """
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
    aside = path.with_name(path.name + DISCARDED_SUFFIX)
    try:
        with _open(aside) as file:
            _append(file, b"".join(line.rstrip(b"\r\n") + b"\n" for line in discarded))
    except OSError as error:
        say(
            f"note: {aside.name} cannot be written, {len(discarded)} lines of {path.name} about steps after "
            f"{step} are deleted: {error}"
        )
    _replace(path, b"".join(kept))


def _open(path: Path) -> Any:
    return open(path, "ab", buffering=0)


def _append(file: Any, data: bytes) -> None:
    """All of `data`, or OSError and nothing of it."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError("the disk took only a part of it (is it full?)")
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _replace(path: Path, data: bytes) -> None:
    """Make `data`, which is shorter, the content of the file: at once, or in place if there is no room for
    both."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate()


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
