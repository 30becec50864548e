"""Where the results of every benchmark go: rows, written as Markdown to the terminal and, where wanted, as
JSON and Markdown to files.

A row is a plain dictionary. Its keys are the columns, with the unit in the name (`images_per_s`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

_OURS = ("torch", "megavit", "deepspeed", "webdataset", "pillow", "simplejpeg", "triton")
_PEERS = ("timm", "vit-pytorch", "mega-vit", "transformers")


class Report:
    """Adds the machine's name to each row and writes it at once. Both files are complete after every row, so
    that a run which is ended early leaves what it has.

    Args:
        command: the benchmark's name.
        settings: its flags, for the reader who repeats it.
        device: "cpu" or "cuda", what the rows are measured on.
        json_file: where to write {"command", "settings", "versions", "date", "rows"}; None writes no JSON.
        markdown_file: where to write the same text as to the terminal; None writes none.
    """

    def __init__(
        self,
        command: str,
        settings: dict[str, Any],
        device: str,
        json_file: Path | None = None,
        markdown_file: Path | None = None,
    ):
        self._machine = machine_name(device)
        used = versions() | {"processor" if device == "cpu" else "gpu": self._machine}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self._content = {"command": command, "settings": settings, "versions": used, "date": date}
        self._rows: list[Row] = []
        self._columns: list[str] = []  # of the table that is being written
        self._lines: list[str] = []
        self._json_file, self._markdown_file = json_file, markdown_file
        self._write(f"# {command}", "", f"Settings: {_listed(settings)}.")
        self._write(f"Versions: {_listed(used)}.", f"Date: {date}.")

    def add(self, row: Row) -> None:
        """Write one result. A column that the table does not have yet begins a new table; a missing one is
        shown as a dash."""
        row = row | {"machine": self._machine}
        self._rows.append(row)
        header: list[str] = []
        if not row.keys() <= set(self._columns):
            self._columns = list(row)
            header = ["", _table_line(self._columns), _table_line(["---"] * len(row))]
        self._write(*header, _table_line([_cell(row.get(column)) for column in self._columns]))

    def _write(self, *lines: str) -> None:
        print("\n".join(lines), flush=True)
        self._lines += lines
        if self._json_file:
            _replace(self._json_file, json.dumps(self._content | {"rows": self._rows}, indent=2))
        if self._markdown_file:
            _replace(self._markdown_file, "\n".join(self._lines))


def machine_name(device: str) -> str:
    """The GPU's name, or the processor's with the vector instructions that torch uses on it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str]:
    """Of the packages that take part in any comparison and are installed, and of the CUDA that torch is built
    for."""
    found = {"cuda": torch.version.cuda or "none"} if torch.cuda.is_available() else {}
    for package in _OURS + _PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in values.items()
    )


def _table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    """Four digits of a number, with thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    """Write a file whole: whoever reads it, also after a kill, finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)
