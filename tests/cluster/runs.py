"""The run that all tests here start, and what they expect of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hosts import HostsLab
from tests.launch.commands import BIN, DEMO, ROOT, TRAIN
from tests.train.runs import log_of, steps_of

SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
STEPS = 24
NODES = ["--nodes=2", "--gpus-per-node=0", "--exclusive"]
LIMIT_S = 600  # for whatever has to happen, on a machine several times slower than this one


def flags(digits: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of `STEPS` steps whose losses do not depend on the layout."""
    return [
        *("--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json"), "--run_dir", str(run_dir)),
        *("--config", DEMO),
        *("--data.shards", f"{digits}/train-*.tar", "--data.val_shards=", "--eval_every", "0"),
        *("--max_steps", str(STEPS), "--log_every", "1", "--schedule.warmup_steps", "5", *more),
    ]


def on_hosts(hosts: HostsLab, folder: Path, words: list[str]) -> list[str]:
    """What the head node starts, from `folder`, for a run with these flags and one rank on each host."""
    variables = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    (folder / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))
    # pdsh hands the command to a shell on the host, which would expand the pattern.
    quoted = [f"'{word}'" if "*" in word else word for word in words]
    start = [str(BIN / "deepspeed"), "--hostfile", str(hosts.hostfile(1)), "--master_port", "29611"]
    return [*start, TRAIN, *quoted]


def check_equal(run_dir: Path, whole: list[dict[str, Any]]) -> None:
    found = steps_of(run_dir)
    assert [row["step"] for row in found] == [row["step"] for row in whole]
    for mine, theirs in zip(found, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]


def wait_until(ready: Callable[[], Any], what: Callable[[], str], timeout_s: float = LIMIT_S) -> Any:
    """What `ready` returns as soon as that is true; an error that holds `what` was said until then."""
    deadline = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what()}"
        time.sleep(0.1)
    return found


def reached(run_dir: Path, step: int) -> bool:
    return (run_dir / "log.jsonl").exists() and any(row["step"] >= step for row in steps_of(run_dir))


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in log_of(run_dir) if row.get("event") == kind]
