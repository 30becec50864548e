"""The package as it is installed from a wheel, away from the checkout."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megavit.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_every_command_has_a_main(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that is listed and cannot be started, and a typing mistake without a hint."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listed
        assert callable(importlib.import_module(f"megavit.launch.{name}").main)
        assert f"megavit.launch.{name} import main" in (ROOT / "launch" / f"{name}.py").read_text()
    with pytest.raises(SystemExit) as exit:
        main(["shards", "digits", "--help"])
    assert exit.value.code == 0 and "--holdout" in capsys.readouterr().out
    assert main(["tarin"]) == 2 and "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_installed_wheel_trains(tmp_path: Path) -> None:
    """Catches a wheel without the trainer, the recipes or the DeepSpeed JSONs, a command that only works in a
    checkout, and data that are written into the installed package."""
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    work.mkdir()
    # Building leaves files in its folder: not in the checkout.
    for name in ("megavit", "launch", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("megavit-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, cwd=work)
    assert (site / "bin" / "megavit").is_file()
    assert (site / "megavit" / "evaluate" / "sets" / "imagenet_classes.txt").is_file()

    def megavit(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "deepspeed --module megavit.launch.train" in megavit("megavit", "train", "--help")
    before = sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
    megavit("megavit", "shards", "digits", "--workers", "1")
    assert (work / "data" / "digits" / "train.manifest.json").is_file()
    start = ("--deepspeed_config", "ds_configs/zero3.json", "--run_dir", "run", "--data.workers", "0")
    short = ("--max_steps", "2", "--schedule.warmup_steps", "0", "--log_every", "1")
    said = megavit("megavit.launch.train", *start, *short)
    assert "step      2/2" in said and (work / "run" / "export" / "model.safetensors").is_file(), said
    assert before == sorted(path for path in site.rglob("*") if "__pycache__" not in path.parts)
