"""The measurements as a user starts them, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each starts the command

BENCH = str(Path(__file__).parents[2] / "launch" / "bench.py")
TINY = ["--shape", "32x2x4x2", "--image_size", "56", "--num_classes", "10", "--rounds", "1"]


def call(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, BENCH, *words], capture_output=True, text=True, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_model_writes_its_rows(tmp_path: Path) -> None:
    """Catches a command that measures and then cannot write, and `--json`, which means the same as
    `--out`."""
    files = ["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    names = ["megavit", "megavit-full", "timm-parallel", "timm-sequential", "timm-cls"]
    code, text = call("model", *TINY, *files, "--models", *names)
    assert code == 0, text
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["settings"]["models"] == names and "timm" in content["versions"]
    rows = content["rows"]
    assert [row["model"] for row in rows] == names
    assert [row["like_for_like"] for row in rows] == [True] * 4 + [False]
    assert {row["ratio_to"] for row in rows} == {"timm-parallel"} and rows[2]["ratio_median"] == 1
    assert "| timm-parallel | yes |" in text and "| timm-parallel | yes |" in (tmp_path / "t.md").read_text()


def test_trainer_at_two_stages(tmp_path: Path) -> None:
    """Catches engines that cannot live in one process any more."""
    code, text = call("trainer", *TINY, "--stages", "0", "3", "--out", str(tmp_path / "t.json"))
    assert code == 0, text
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["step"][-1] for row in rows[1:]] == ["0", "3"]


def test_mistakes_are_named_before_a_file_is_written(tmp_path: Path) -> None:
    """Catches tracebacks, and earlier results that a misspelt name overwrites."""
    code, text = call("model", *TINY, "--models", "timm-paralel", "--out", str(tmp_path / "t.json"))
    assert code == 1 and "error: --models timm-paralel: no such model; known: megavit" in text
    assert not (tmp_path / "t.json").exists()
