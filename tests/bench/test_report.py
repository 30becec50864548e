"""What a benchmark writes, and the arithmetic of its ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavit.bench.report import Report, machine_name
from megavit.bench.rounds import ratio_to, rounds


def test_files_are_complete_after_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches results that are lost when a long run is ended early, and rows that do not say their
    machine."""
    json_file, markdown_file = tmp_path / "new" / "r.json", tmp_path / "r.md"
    report = Report("model", {"rounds": 3, "shape": ["a", "b"]}, "cpu", json_file, markdown_file)

    def interrupted() -> Iterator[dict[str, object]]:
        yield {"model": "ours", "images_per_s": 12345.678, "ratio_median": 1.23456, "alike": True}
        yield {"model": "theirs", "note": "a|b"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for row in interrupted():
            report.add(row)
    content = json.loads(json_file.read_text())
    assert list(content) == ["command", "settings", "versions", "date", "rows"]
    assert content["command"] == "model" and content["settings"]["rounds"] == 3
    assert content["versions"].keys() >= {"torch", "processor"}
    machine = machine_name("cpu")
    assert content["rows"][0]["images_per_s"] == 12345.678
    assert [row["machine"] for row in content["rows"]] == [machine] * 2
    text = markdown_file.read_text()
    assert f"| ours | 12,346 | 1.235 | yes | {machine} |" in text
    assert f"| theirs | a\\|b | {machine} |" in text  # an unknown column begins a new table
    assert "shape a b" in text and capsys.readouterr().out == text


def test_a_missing_column_is_a_dash(tmp_path: Path) -> None:
    """Catches values under the wrong heading."""
    report = Report("gpu", {}, "cpu", markdown_file=tmp_path / "r.md")
    report.add({"batch": 8, "ms": 1.5, "mfu": None, "error": ""})
    report.add({"error": "out of memory", "batch": 16})
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert lines[-2].startswith("| 8 | 1.5 | - |  |") and lines[-1].startswith(
        "| 16 | - | - | out of memory |"
    )
    assert sum(line.startswith("| batch |") for line in lines) == 1


def test_ratios_are_taken_within_a_round() -> None:
    """Catches a ratio of medians, which a busy minute would move, and a first round that is counted."""
    times = iter([0, 99, 0, 1, 1, 3, 0, 2, 2, 4, 0, 3, 3, 3.5])
    seconds = rounds({"a": lambda: None, "b": lambda: None}, 3, lambda: next(times))
    assert seconds == {"a": [2, 2, 0.5], "b": [1, 2, 3]}  # the order turns: b is first in rounds 1 and 3
    ratio = ratio_to("a", {"a": [4, 1, 10], "b": [2, 1, 20]}, "b")
    assert ratio == {"ratio_to": "a", "ratio_median": 1, "ratio_low": 0.5, "ratio_high": 2}
