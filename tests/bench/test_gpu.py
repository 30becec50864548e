"""The hour on a GPU, gone through at tiny sizes on whatever there is, and the rules of its stages."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megavit.bench.gpu import anchors, hour, rehearse, trainer, whole
from megavit.bench.gpu.setting import dry_setting, hour_setting
from megavit.bench.gpu.stage import Case, Stage, Unavailable, run_stage
from megavit.bench.report import Report, Row
from megavit.launch.bench import main
from megavit.scale.rates import read_rates
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
# What a CPU lacks.
EXPECTED = (
    "RuntimeError: No viable backend for scaled_dot_product_attention",
    "model.matmul fp8 is not in torch",  # before 2.15
    "a CPU has no link to its host",
)
# Columns by which the figures are read, of the first row that has them all.
COLUMNS = {
    "block": {"micro_batch", "recompute", "compiled", "ms", "mfu", "of_ceiling", "peak_gib", "error"},
    "matmul": {"work", "pass", "dtype", "M", "N", "K", "ms", "tflop_per_s", "of_peak", "error"},
    "rates": {"rate", "value", "assumed", "file", "error"},
    "fp8": {"work", "pass", "bf16_ms", "fp8_ms", "speedup", "error"},
    "whole": {
        "recompute",
        "micro_batch",
        "images_per_s",
        "mfu",
        "mfu_of_trunk",
        "expected_peak_gib",
        "error",
    },
    "trainer": {"step", "compiled", "images_per_s", "mfu", "ratio", "error"},
    "rehearse": {"plan", "blocks", "peak_gib", "peak_predicted", "time_predicted", "error"},
}


def dry(name: str, out: Path) -> list[Row]:
    assert main(["gpu", "--dry", "--stage", name, "--out", str(out)]) == 0
    content = json.loads((out / f"{name}.json").read_text())
    assert content["settings"]["dry"] and (out / f"{name}.md").read_text().startswith("# gpu --stage")
    return content["rows"]


def errors(rows: list[Row]) -> list[str]:
    return [row["error"] for row in rows if row["error"] and not row["error"].startswith(EXPECTED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block", "matmul", "fp8", "whole"])
def test_stages_go_through_every_case(name: str, tmp_path: Path) -> None:
    """Catches a case that would fail in the hour for a reason that is not the GPU's, and figures that are not
    under the columns by which they are read."""
    rows = dry(name, tmp_path)
    assert not errors(rows)
    assert any(row.keys() >= COLUMNS[name] for row in rows)
    assert len(rows) > 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("name", "fresh"), [("trainer", False), ("rehearse", True)])
def test_stages_with_the_engine(name: str, fresh: bool, tmp_path: Path) -> None:
    """Catches an engine that the hour builds otherwise than the trainer does, and a rank that is not the
    plan's."""
    (rows,) = run_ranks(1, dry, name, tmp_path, fresh=fresh)
    assert not errors(rows)
    assert all(row.keys() >= COLUMNS[name] for row in rows)
    if name == "trainer":
        assert {row["step"] for row in rows} >= {f"trainer, ZeRO stage {stage}" for stage in (1, 3)}
        assert all(row["ratio"] == 1 for row in rows if "timm-parallel" in row["step"])
    else:
        assert rows[0]["blocks"] == "3 of 3" and 0.98 < rows[0]["persistent_predicted"] < 1.02


def stage_of(*measures: Callable[[], Row], limit_s: float = 100.0) -> Stage:
    cases = [Case({"case": number}, measure) for number, measure in enumerate(measures)]
    return Stage("some", "nothing", limit_s, lambda setting: cases)


def rows_of(stage: Stage, tmp_path: Path, **options: Any) -> list[Row]:
    report = Report("some", {}, "cpu", tmp_path / "some.json")
    run_stage(stage, dry_setting(tmp_path), report, stage.limit_s, **options)
    return json.loads((tmp_path / "some.json").read_text())["rows"]


def fails(error: Exception) -> Callable[[], Row]:
    def measure() -> Row:
        raise error

    return measure


def test_what_one_case_runs_into_is_its_row(tmp_path: Path) -> None:
    """Catches one case too large for the GPU that ends all others."""
    stage = stage_of(
        fails(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")),
        fails(ModuleNotFoundError("No module named 'triton'")),
        fails(Unavailable("DeepSpeed is not installed")),
        lambda: {"ms": 1.0},
    )
    rows = rows_of(stage, tmp_path)
    assert [row["error"] for row in rows] == [
        "OutOfMemoryError: CUDA out of memory.",
        "ModuleNotFoundError: No module named 'triton'",
        "DeepSpeed is not installed",
        "",
    ]
    assert [row["case"] for row in rows] == [0, 1, 2, 3] and rows[3]["ms"] == 1.0


def test_a_stage_ends_by_its_own_clock(tmp_path: Path) -> None:
    """Catches a stage that is killed with its last figures, or that leaves out cases without a word."""
    now = iter([0.0, 10.0, 99.0, 100.0])
    rows = rows_of(stage_of(*[lambda: {"ms": 1.0}] * 5), tmp_path, clock=lambda: next(now))
    assert [row["error"] for row in rows] == [""] * 2 + ["left out: the 100 s of this stage were over"] * 3
    assert [row["case"] for row in rows] == [0, 1, 2, 3, 4]


def test_the_hour_fits_its_commands() -> None:
    """Catches stages that together, or each with what may come on top, take longer than a lease."""
    assert sum(stage.limit_s for stage in hour.STAGES.values()) + 60 <= 45 * 60
    assert max(stage.limit_s for stage in hour.STAGES.values()) + hour._GRACE_S <= hour._LONGEST_S < 600
    assert list(hour.STAGES)[:2] == ["block", "trainer"]
    assert "| all | 42 | |" in hour.budget()


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an hour that is spent on another stage than meant, or on a CPU."""
    for words, message in [
        (["--stage", "blok", "--dry"], "--stage blok: no such stage; did you mean 'block'?"),
        (["--minutes", "0", "--dry"], "--minutes 0: give more than 0"),
        *([] if torch.cuda.is_available() else [([], "gpu needs a CUDA device, and torch sees none; --dry")]),
    ]:
        assert main(["gpu", "--out", str(tmp_path / "x"), *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    hour.run_each([hour.STAGES["block"], hour.STAGES["fp8"]], tmp_path, 0.5, dry=True)
    assert "left out, the 0.5 minutes are over: block, fp8" in capsys.readouterr().err


@pytest.mark.slow
def test_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    """Catches a stage about kernels, or the supervisor, that imports what only the data or DeepSpeed need:
    all stages are loaded in a process for which those packages are not there."""
    code = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"deepspeed", "webdataset", "braceexpand", "simplejpeg", "isal"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from megavit.launch.bench import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["gpu", "--dry", "--stage", "matmul", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "matmul.json").is_file()


@pytest.mark.slow
def test_engines_need_deepspeed_and_bare_models_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stage that is lost because one package is missing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else name)
    cases = [case for case in trainer.cases(dry_setting(tmp_path)) if not case.names["compiled"]]
    rows = rows_of(Stage("trainer", "", 100.0, lambda setting: cases), tmp_path)
    assert {row["step"][:7]: row["error"] for row in rows} == {
        "bare mo": "",
        "trainer": "DeepSpeed is not installed",
    }
    with pytest.raises(Unavailable, match="DeepSpeed is not installed"):
        rehearse.rank_cases(dry_setting(tmp_path)).__next__().measure()


def test_what_does_not_fit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that swaps, or a GPU that runs out of memory after minutes of building."""
    monkeypatch.setattr(rehearse, "free_host_bytes", lambda: 1000)
    (case,) = rehearse.offload_cases(dry_setting(tmp_path))
    with pytest.raises(Unavailable, match="does not fit: .* GB of host memory, and 0.0 GB are free"):
        case.measure()
    sizes = hour_setting(tmp_path)
    gigabytes = {
        (recompute, batch): whole.needed_bytes(sizes.whole, recompute, batch, 2) / 1e9
        for recompute, batch in (("selective", 16), ("none", 8), ("selective", 64))
    }
    assert gigabytes["selective", 16] < 80 and gigabytes["none", 8] < 80  # an H100 has 84.9
    assert 120 < gigabytes["selective", 64] < 147  # an H200 has 150


@pytest.mark.slow
def test_rates_are_a_file_that_the_planner_reads(tmp_path: Path) -> None:
    """Catches a file of measured rates that the planner refuses, or that names another card."""
    rows = dry("rates", tmp_path)
    assert not errors(rows) and any(row.keys() >= COLUMNS["rates"] for row in rows)
    row = next(row for row in rows if row["rate"] == "matmul_share")
    found = read_rates(tmp_path / row["file"])
    assert found.matmul_share == row["value"]
    assert "latency_s" not in found.measured and found.source.endswith(f"({tmp_path / row['file']})")
    assert any("predicted/measured" in row for row in rows)


def test_published_figures_are_compared_with_the_best_row(tmp_path: Path) -> None:
    """Catches a row with an error, the wrong column, or another stage's row that counts."""
    rows = [
        {"step": "bare model, megavit", "compiled": True, "mfu": 0.9, "images_per_s": 900.0, "error": ""},
        {"step": "trainer, ZeRO stage 3", "compiled": True, "mfu": 0.4, "ratio": 0.9, "error": ""},
        {"step": "trainer, ZeRO stage 1", "compiled": True, "error": "OutOfMemoryError: CUDA"},
        {"step": "trainer, ZeRO stage 3", "compiled": False, "mfu": 0.3, "ratio": 1.2, "error": ""},
    ]
    for row in rows:
        row.setdefault("images_per_s", 100.0)
    (tmp_path / "trainer.json").write_text(json.dumps({"rows": rows}))
    found = {(row["measure"], row["published"]): row for row in anchors.verdicts(tmp_path)}
    assert found["trainer MFU", 0.289]["beaten"] and found["trainer MFU", 0.289]["ours"] == 0.4
    assert found["trainer MFU", 0.444]["beaten"] is False
    assert found["trainer against timm", 1.0]["ours/published"] == 0.9
    assert found["matmul TFLOP/s", 794.5]["ours"] is None is found["matmul TFLOP/s", 794.5]["beaten"]
    assert all(anchor.measure in anchors.MEASURES and anchor.source for anchor in anchors.ANCHORS)


@functools.cache
def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_each_stage_is_a_process_and_the_end_is_a_table(tmp_path: Path) -> None:
    """Catches stages whose process cannot be started, and an end that does not find their files."""
    words = ["gpu", "--dry", "--stage", "matmul", "anchors", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "megavit", "bench", *words],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "stage matmul: what matmuls reach" in done.stdout and "| all | 42 | |" in done.stdout
    rows = json.loads((tmp_path / "anchors.json").read_text())["rows"]
    found = {row["measure"]: row for row in rows}
    assert found["matmul TFLOP/s"]["ours"] > 0 and found["trainer MFU"]["ours"] is None
