"""The measurements as a user starts them, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # real benchmarks, at the smallest size

BENCH = str(Path(__file__).parents[2] / "launch" / "bench.py")
TINY = ["--shape", "32x2x4x2", "--image_size", "56", "--num_classes", "10", "--rounds", "1"]


def call(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, BENCH, *words], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_model_writes_its_tables(tmp_path: Path) -> None:
    """Catches a command that measures and then cannot write or draw, and a peer that is not built at our
    shape."""
    files = ["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    files += ["--plot", str(tmp_path / "t.png")] if has_matplotlib else []
    names = ["megavit", "megavit-full", "timm-parallel", "timm-sequential", "timm-cls"]
    code, text = call("model", *TINY, *files, "--models", *names)
    assert code == 0, text
    (table,) = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert [row["model"] for row in table["rows"]] == names
    assert [row["alike"] for row in table["rows"]] == [True] * 4 + [False]
    assert table["rows"][2]["x_reference"] == {"median": 1, "low": 1, "high": 1}
    assert "| timm-parallel | yes |" in text and "| timm-parallel | yes |" in (tmp_path / "t.md").read_text()
    assert not has_matplotlib or (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


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


def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    """Catches a case that fails for another reason than a backend that CPUs lack, and a formula of the held
    memory that is not what is held."""
    files = ["--json", str(tmp_path / "g.json"), "--markdown", str(tmp_path / "g.md")]
    sizes = ["--width", "64", "--heads", "2", "--tokens", "16", "--blocks", "2", "--batch", "16"]
    code, text = call("gpu", *sizes, "--dtype", "float32", "--rounds", "1", "--modes", "eager", *files)
    assert code == 0, text
    found = json.loads((tmp_path / "g.json").read_text())
    results = {tuple(r["case"].values()): r for r in found["results"]}
    failed = {case[3] for case, r in results.items() if r["error"]}
    assert failed == {"efficient", "cudnn"}
    for recompute, held in {"none": 16, "selective": 9, "full": 1}.items():
        result = results[16, recompute, False, "default", False]
        assert held <= result["held"] <= held + 0.25 and result["of_ceiling"] > 0
    assert "No viable backend" in (tmp_path / "g.md").read_text()


@pytest.mark.dist
def test_communication(tmp_path: Path) -> None:
    """Catches ranks that do not talk, lonely ones that wait, and a chunked reduce that sends more."""
    sizes = ["--shape", "32x1x2x2", "--image_size", "28", "--rounds", "1", "--json", str(tmp_path / "t.json")]
    code, text = call("communication", *sizes, "--ways", "tp2-one-chunk", "tp2")
    assert code == 0, text
    plain, chunked = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert plain["megabytes"] == chunked["megabytes"] > 0
    assert plain["alone_s"] > 0 and plain["talking_s"] > 0
    code, text = call("communication", *sizes, "--ways", "dp3")
    assert code == 1 and "no way is called 'dp3'" in text
