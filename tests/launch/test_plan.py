"""`launch/plan.py` as a user runs it. What it writes is run by a test of SLURM."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavit.launch.plan import main
from megavit.recipe import RECIPES, read_recipe
from megavit.train.config import steps_of_epochs
from megavit.train.ds_config import load_ds_config

ROOT = Path(__file__).parents[2]
SMALL = ["--model.name", "vit_s16", "--global_batch", "1024", "--only", "tp=1,stage=2,recompute=none"]


@pytest.mark.slow  # whole searches, at ten numbers of GPUs
def test_table_json_plot_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan that cannot be submitted: files that the trainer refuses, or that say otherwise."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    out, facts_file, image = tmp_path / "plan", tmp_path / "plan.json", tmp_path / "plan.png"
    recipe_file = str(RECIPES / "vit_22b_jft.yaml")
    status = main(
        [
            *("--config", recipe_file, "--nodes", "16", "--gpu", "h100", "--out", str(out)),
            *("--json", str(facts_file), "--plot", str(image), "--data.shards", "x.tar"),
        ]
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert "| best |" in printed and "GPU-hours" in printed and "| 4096 |" in printed
    assert image.read_bytes().startswith(b"\x89PNG")
    best = json.loads(facts_file.read_text())["plans"][0]
    assert best["fits"] and best["layout"]["tp_size"] == 1
    ds_config = load_ds_config(out / "ds_config.json")
    run, recipe = read_recipe(out / "run.yaml"), read_recipe(recipe_file)
    data = dataclasses.replace(recipe.data, shards="x.tar")
    assert run == dataclasses.replace(recipe, data=data, recompute=best["recompute"])
    assert run.recompute == best["recompute"] and run.model.name == "vit_22b" and run.model.depth == 48
    assert run.tensor_parallel_size == 1 and run.data.shards == "x.tar"
    assert ds_config["train_batch_size"] == 65_536
    assert ds_config["train_micro_batch_size_per_gpu"] == best["layout"]["micro_batch"]
    assert yaml.safe_load((out / "run.yaml").read_text())["model"] == {"name": "vit_22b"}
    script = (out / "train.sbatch").read_text()
    assert "#SBATCH --nodes=16" in script and "/ds_config.json" in script
    subprocess.run(["bash", "-n", str(out / "train.sbatch")], check=True)


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches words between the JSON, and days of a run whose length nobody gave."""
    assert main([*SMALL, "--json", "-"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["model"]["name"] == "vit_s16" and facts["plans"][0]["days"] is None
    assert "| best |" in printed.err and "days and GPU-hours need --max_steps" in printed.err


def test_epochs_give_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches epochs that are counted with another batch, lost on the way to the files, or rounded down."""
    epochs = ["--epochs", "90", "--dataset_size", "1281167"]
    assert main([*SMALL, *epochs, "--out", str(tmp_path / "plan")]) == 0
    steps = -(-90 * 1_281_167 // 1024)
    assert f"{steps:,} steps of 1,024 images" in capsys.readouterr().out
    assert read_recipe(tmp_path / "plan" / "run.yaml").max_steps == steps


def test_steps_of_epochs() -> None:
    """Catches a step too many from a decimal fraction, and a last part of an epoch that is left out."""
    assert steps_of_epochs(1, 1024, 256) == 4 and steps_of_epochs(1, 1025, 256) == 5
    assert steps_of_epochs(0.1, 1000, 10) == 10 and steps_of_epochs(1.1, 1000, 10) == 110
    assert steps_of_epochs(1e-9, 10, 10) == 1


def test_what_is_frozen_is_said_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a flag that is planned with and then lost on the way to the files."""
    freeze = "trunk.embed,trunk.blocks,trunk.norm"
    out, facts_file = tmp_path / "plan", tmp_path / "plan.json"
    flags = [*SMALL, "--freeze", freeze, "--out", str(out), "--json", str(facts_file)]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    facts = json.loads(facts_file.read_text())
    trained, whole = facts["parameters"]["trained"], facts["parameters"]["all"]
    assert f"trains {trained:,} of {whole:,} parameters" in printed and f"frozen: {freeze}\n" in printed
    assert "--init_from ..." in printed and "MFU 0" not in printed
    assert facts["freeze"] == freeze and facts["plans"][0]["mfu"] is None
    assert read_recipe(out / "run.yaml").freeze == freeze
    assert f"# Frozen: {freeze}.\n" in (out / "train.sbatch").read_text()
    assert main([*SMALL, "--freeze", "trunk.blocks.12"]) == 2
    assert "error: --freeze trunk.blocks.12: there is no such module" in capsys.readouterr().err


def test_a_head_on_a_frozen_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan for a classifier where another task was asked for, a trunk that keeps activations or has
    moments although it is frozen, and a task that is lost on the way to the files."""
    recipe, out, facts_file = str(RECIPES / "depth_dpt.yaml"), tmp_path / "plan", tmp_path / "plan.json"
    flags = ["--deepspeed_config", "ds_configs/zero3_depth.json", "--json", str(facts_file)]
    only = "tp=1,stage=3,recompute=none,offload=none"
    assert main(["--config", recipe, *flags, "--only", only, "--out", str(out)]) == 0
    assert "frozen: trunk\n" in capsys.readouterr().out
    facts = json.loads(facts_file.read_text())
    trained, whole = facts["parameters"]["trained"], facts["parameters"]["all"]
    assert 40e6 < trained < 50e6 and 22e9 < whole < 23e9  # a DPT decoder of width 256 on tokens of 6,144
    plan = facts["plans"][0]
    assert plan["memory_bytes"]["persistent"]["Adam's moments"] == pytest.approx(trained, rel=1e-3)  # 8 / 8
    assert plan["memory_bytes"]["transient"].get("activations kept for backward", 0) == 0
    assert plan["mfu"] is None and plan["fits"]
    run = read_recipe(out / "run.yaml")
    # Where the trunk comes from is said at the start of a run.
    assert run == dataclasses.replace(read_recipe(recipe), recompute="none", init_from="")


def test_a_kind_of_gpu_that_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a description that the search does not use: twice the rate is a faster step."""

    def step_s(gpu: str) -> float:
        assert main([*SMALL, "--gpu", gpu, "--cores_per_gpu", "99", "--json", "-"]) == 0
        return float(json.loads(capsys.readouterr().out)["plans"][0]["step_s"]["matmuls"])

    assert step_s("mine:80:400:2000") == pytest.approx(2 * step_s("mine:80:800:2000"))


def test_what_does_not_fit_is_an_error_that_says_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a plan that is written although it cannot run."""
    out = tmp_path / "plan"
    flags = ["--model.name", "vit_22b", "--gpu", "a100_40", "--only", "offload=none,stage=3,tp=8"]
    assert main([*flags, "--out", str(out)]) == 1 and not out.exists()
    printed = capsys.readouterr()
    assert "does not fit" in printed.out and "would fit without offloading on 2 such nodes" in printed.out
    assert printed.err == "error: no plan fits, see the notes above, and no files were written\n"


def test_mistakes_are_said_before_torch_is_imported() -> None:
    """Catches seconds of imports before one line that says what is wrong with a flag."""
    code = """
import sys
from megavit.launch.plan import main
for flags in ("--gpu h1000", "--only tp=5", "--global_batch 3 --nodes 2", "--epochs 1"):
    assert main(["--model.name", "vit_22b", *flags.split()]) == 2, flags
sys.exit(bool({"torch", "deepspeed", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 4
