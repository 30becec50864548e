"""A run's JSON-lines files, on disks with and without room."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megavit.train.logging.log_file import LogFile
from tests.disks import fill, small_disk


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_going_back_sets_later_lines_aside(tmp_path: Path) -> None:
    """Catches steps that are logged twice, lines that are lost, and an event of an earlier step that is lost
    with the later ones around it."""
    log = LogFile(tmp_path / "log.jsonl", print)
    for step in (1, 2, 5, 3, 6):
        log.write(step=step)
    log.rewind(4)
    log.write(step=5)
    assert steps_in(tmp_path / "log.jsonl") == [1, 2, 3, 5]
    assert steps_in(tmp_path / "log.jsonl.discarded") == [5, 6]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_going_back_on_a_full_disk(tmp_path: Path) -> None:
    """Catches a rollback that ends the run because its log cannot be copied, or leaves the steps that will be
    done again in it."""
    said: list[str] = []
    with small_disk(tmp_path / "run", "1m"):
        path = tmp_path / "run" / "log.jsonl"
        log = LogFile(path, said.append)
        for step in range(2000):
            log.write(step=step, text="x" * 100)
        with open(tmp_path / "run" / "filler", "wb", buffering=0) as disk:
            fill(disk)
        log.rewind(1500)
        assert steps_in(path) == list(range(1501))
        assert len(said) == 1 and "499 lines of log.jsonl about steps after 1500 are deleted" in said[0]
        log.write(step=1501)  # there is room again where the others were
        assert steps_in(path)[-1] == 1501
        assert sorted(file.name for file in path.parent.iterdir()) == [
            "filler",
            path.name,
            f"{path.name}.discarded",
        ]
