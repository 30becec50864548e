"""`launch/plan.py` as a user runs it. What it writes is run by a test of SLURM."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavit.recipe import RECIPES, read_recipe
from megavit.train.ds_config import load_ds_config

pytestmark = pytest.mark.slow  # whole searches by the command

ROOT = Path(__file__).parents[2]


def plan(*flags: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_table_json_plot_and_files(tmp_path: Path) -> None:
    """Catches a plan that cannot be submitted: files that the trainer refuses, or that say otherwise."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    out, facts_file, image = tmp_path / "plan", tmp_path / "plan.json", tmp_path / "plan.png"
    done = plan(
        *("--config", "launch/recipes/vit_22b_jft.yaml", "--nodes", "16", "--gpu", "h100", "--out", str(out)),
        *("--json", str(facts_file), "--plot", str(image), "--data.shards", "x.tar"),
    )
    assert done.returncode == 0, done.stderr
    assert "| best |" in done.stdout and "GPU-hours" in done.stdout and "| 4096 |" in done.stdout
    assert image.read_bytes().startswith(b"\x89PNG")
    best = json.loads(facts_file.read_text())["plans"][0]
    assert best["fits"] and best["layout"]["tp_size"] == 1
    ds_config = load_ds_config(out / "ds_config.json")
    run, recipe = read_recipe(out / "run.yaml"), read_recipe(RECIPES / "vit_22b_jft.yaml")
    data = dataclasses.replace(recipe.data, shards="x.tar")
    assert run == dataclasses.replace(recipe, data=data, recompute=best["recompute"])
    assert run.recompute == best["recompute"] and run.model.name == "vit_22b" and run.model.depth == 48
    assert run.tensor_parallel_size == 1 and run.data.shards == "x.tar"
    assert ds_config["train_batch_size"] == 65_536
    assert ds_config["train_micro_batch_size_per_gpu"] == best["layout"]["micro_batch"]
    assert yaml.safe_load((out / "run.yaml").read_text())["model"] == {"name": "vit_22b"}
    printed = plan("--model.name", "vit_l16", "--json", "-")
    facts = json.loads(printed.stdout)
    assert facts["model"]["name"] == "vit_l16" and facts["plans"][0]["days"] is None
    assert "| best |" in printed.stderr and "days and GPU-hours need --max_steps" in printed.stderr
    script = (out / "train.sbatch").read_text()
    assert "#SBATCH --nodes=16" in script and "/ds_config.json" in script
    subprocess.run(["bash", "-n", str(out / "train.sbatch")], check=True)


def test_what_does_not_fit_is_an_error_that_says_what_would(tmp_path: Path) -> None:
    """Catches a plan that is written although it cannot run."""
    out = tmp_path / "plan"
    flags = ("--model.name", "vit_22b", "--gpu", "a100_40", "--only", "offload=false", "--out", str(out))
    done = plan(*flags)
    assert done.returncode == 1 and not out.exists()
    assert "does not fit" in done.stdout and "it fits on 2 such nodes" in done.stdout
    for wrong, message in [
        (("--gpu", "h1000"), "unknown GPU 'h1000'; did you mean 'h100'"),
        (("--nodes", "0"), "nodes must be positive"),
        (("--only", "tp=5"), "no layout is possible"),
        (("--nodez", "2"), "did you mean '--nodes'"),
    ]:
        failed = plan("--model.name", "vit_22b", *wrong)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
