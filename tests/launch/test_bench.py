"""The measurements as a user starts them, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = str(Path(__file__).parents[2] / "launch" / "bench.py")
TINY = ["--shape", "32x2x4x2", "--image_size", "56", "--num_classes", "10", "--rounds", "1"]


def call(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, BENCH, *words], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_model_writes_its_tables(tmp_path: Path) -> None:
    """Catches a command that measures and then cannot write, and a peer that is not built at our shape."""
    files = ["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    names = ["megavit", "megavit-full", "timm-parallel", "timm-sequential", "timm-cls"]
    code, text = call("model", *TINY, *files, "--models", *names)
    assert code == 0, text
    (table,) = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert [row["model"] for row in table["rows"]] == names
    assert [row["alike"] for row in table["rows"]] == [True] * 4 + [False]
    assert table["rows"][2]["x_reference"] == {"median": 1, "low": 1, "high": 1}
    assert "| timm-parallel | yes |" in text and "| timm-parallel | yes |" in (tmp_path / "t.md").read_text()


def test_trainer_at_every_stage(tmp_path: Path) -> None:
    """Catches engines that cannot live in one process any more."""
    code, text = call("trainer", *TINY, "--json", str(tmp_path / "t.json"))
    assert code == 0, text
    (table,) = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert [row["step"][-1] for row in table["rows"][1:]] == ["0", "1", "2", "3"]


def test_mistakes_are_named() -> None:
    """Catches tracebacks."""
    code, text = call("model", *TINY, "--models", "timm-paralel")
    assert code == 1 and "did you mean 'timm-parallel'" in text


def test_plot(tmp_path: Path) -> None:
    """Catches a chart that cannot be drawn."""
    pytest.importorskip("matplotlib")
    code, text = call("model", *TINY, "--models", "megavit", "--plot", str(tmp_path / "x.png"))
    assert code == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG"), text
