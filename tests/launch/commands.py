"""`launch/train.py` on the digits: as a user starts it, or, much faster, its `main` in waiting ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megavit.recipe import RECIPES
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
DEMO = str(RECIPES / "digits.yaml")
SHORT = ["--max_steps", "20", "--log_every", "1", "--schedule.warmup_steps", "5"]


@dataclass
class Run:
    code: int
    output: str
    folder: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.log if "loss" in row and "event" not in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.log if "eval" in row]

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export" / "model.safetensors")


def arguments(folder: Path, data: Path, *flags: str, json_file: str = "zero3.json") -> list[str]:
    """What follows `launch/train.py`."""
    config = str(ROOT / "ds_configs" / json_file) if "/" not in json_file else json_file
    words = ["--deepspeed_config", config, "--run_dir", str(folder), "--config", DEMO]
    return [*words, "--data.shards", f"{data}/train-*.tar", "--data.val_shards", f"{data}/test-*.tar", *flags]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def starter(ranks: int | None) -> list[str]:
    """What precedes `launch/train.py`: the deepspeed launcher, or plain python if `ranks` is None."""
    if ranks is None:
        return [sys.executable]
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def launch(folder: Path, data: Path, *flags: str, ranks: int | None) -> Run:
    """One training run, started as a user does, from `folder`'s parent."""
    done = subprocess.run(
        [*starter(ranks), TRAIN, *arguments(folder, data, *flags)],
        cwd=folder.parent,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    return Run(done.returncode, done.stdout, folder)


def train(
    folder: Path, data: Path, *flags: str, ranks: int = 1, json_file: str = "zero3.json", fresh: bool = False
) -> Run:
    """The same run without the start of a launcher, python and its imports."""
    return train_with(arguments(folder, data, *flags, json_file=json_file), folder, ranks, fresh)


def again(run: Run, *flags: str) -> Run:
    """The same run folder, started without any of its flags."""
    config = str(ROOT / "ds_configs" / "zero3.json")
    return train_with(["--deepspeed_config", config, "--run_dir", str(run.folder), *flags], run.folder)


def train_with(argv: list[str], folder: Path, ranks: int = 1, fresh: bool = False) -> Run:
    """`train` with these words after `launch/train.py`, which name the run folder `folder`."""
    output = folder.with_name(f"{folder.name}.output")
    output.unlink(missing_ok=True)
    codes = run_ranks(ranks, _main, argv, folder.parent, output, fresh=fresh)
    return Run(max(codes), output.read_text(), folder)


def _main(argv: list[str], folder: Path, output: Path) -> int:
    """In a rank."""
    from launch.train import main

    os.chdir(folder)
    with open(output, "a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return main(argv)
        except SystemExit as end:  # wrong flags
            return int(end.code or 0)
