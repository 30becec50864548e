"""The trainer on a real SLURM and on hosts with a network between them, through all that happens to jobs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megavit.launch import plan
from tests.cluster.runs import (
    LIMIT_S,
    NODES,
    SBATCH,
    STEPS,
    check_equal,
    events,
    flags,
    on_hosts,
    reached,
    wait_until,
)
from tests.lab.hosts import HostsLab
from tests.lab.slurm import SlurmLab
from tests.launch.commands import ROOT
from tests.train.runs import steps_of


@pytest.mark.slurm
@pytest.mark.slow
def test_notice_requeue_resume_on_two_nodes(
    slurm: SlurmLab, digits: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Catches a shipped script, or a rendezvous, that does not work on two nodes; a job that is told to stop
    and loses a step by it. ZeRO-3 x TP 2, two tasks a node."""
    run_dir = tmp_path / "run"
    job = slurm.sbatch(
        SBATCH,
        *flags(digits, run_dir, "--tensor_parallel_size", "2", "--checkpoint.every", "0"),
        options=[*NODES, "--ntasks-per-node=2", f"--output={tmp_path}/%j.log"],
        cwd=ROOT,
    )
    wait_until(lambda: reached(run_dir, 4), lambda: slurm.output(job))
    slurm.scancel("--batch", "--signal=USR1", job)
    ended = slurm.wait(job, timeout_s=LIMIT_S)
    output = slurm.output(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    (stopped,), (resumed,) = events(run_dir, "stopped"), events(run_dir, "resumed")
    assert 4 <= stopped["step"] == resumed["step"] < STEPS and stopped["reason"] == "SIGUSR1"
    assert "dp 2 x tp 2" in output
    check_equal(run_dir, whole)


@pytest.mark.slurm
@pytest.mark.slow
def test_preemption_by_a_higher_partition(
    slurm: SlurmLab, digits: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Catches a run that loses its work, or its place, to a more important job."""
    run_dir = tmp_path / "run"
    urgent = tmp_path / "urgent"
    urgent.write_text("#!/bin/bash\nhostname\n")
    job = slurm.sbatch(SBATCH, *flags(digits, run_dir), options=[*NODES, "--ntasks-per-node=1"], cwd=ROOT)
    wait_until(lambda: reached(run_dir, 3), lambda: slurm.output(job))
    high = slurm.sbatch(urgent, options=["--partition=high", "--nodes=2", "--exclusive"])
    assert slurm.wait(high, timeout_s=LIMIT_S)["JobState"] == "COMPLETED", slurm.output(job)
    ended = slurm.wait(job, timeout_s=LIMIT_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.output(job)
    assert events(run_dir, "stopped")[0]["step"] == events(run_dir, "resumed")[0]["step"]
    check_equal(run_dir, whole)


@pytest.mark.slurm
@pytest.mark.slow
def test_time_limit(slurm: SlurmLab, digits: Path, tmp_path: Path) -> None:
    """Catches a run that is killed by its time limit although it was told, or that starts from scratch."""
    run_dir = tmp_path / "run"
    job = slurm.sbatch(
        SBATCH,
        *flags(digits, run_dir, "--max_steps", "100000", "--checkpoint.every", "0"),
        options=[
            *("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={tmp_path}/%j.log"),
            *("--time=3", "--signal=B:USR1@60"),  # two minutes to begin in: it must have taken a step
        ],
        cwd=ROOT,
    )
    slurm.wait_until(job, lambda state: state["Restarts"] == "1", timeout_s=LIMIT_S)
    wait_until(lambda: events(run_dir, "resumed"), lambda: slurm.output(job))
    # The first of each: by now the next life may have been told as well.
    stopped, resumed = events(run_dir, "stopped")[0], events(run_dir, "resumed")[0]
    assert 0 < stopped["step"] == resumed["step"], slurm.output(job)


@pytest.mark.dist
@pytest.mark.slow
def test_a_cut_host_ends_the_job_and_the_next_start_goes_on(
    hosts: HostsLab, digits: Path, tmp_path: Path
) -> None:
    """Catches processes that wait for ever for a host that is gone, and a run that cannot be picked up.
    deepspeed --hostfile over pdsh, two hosts."""
    run_dir = tmp_path / "run"
    limit_s = 15
    slow = ["--checkpoint.every", "4", "--timeout_s", str(limit_s), "--model.depth", "12"]

    def start() -> subprocess.Popen[str]:
        command = on_hosts(hosts, tmp_path, flags(digits, run_dir, *slow))
        log = (tmp_path / "output").open("a")
        return hosts.head(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, text=True)

    def ranks() -> list[int]:
        return [pid for host in hosts.hosts for pid in hosts.pids(host, "launch/train.py")]

    process = start()
    latest = run_dir / "checkpoints" / "latest"
    wait_until(latest.exists, (tmp_path / "output").read_text)
    hosts.cut("h2")
    cut_at = time.monotonic()
    wait_until(lambda: not ranks(), lambda: f"{ranks()} still run")
    assert time.monotonic() - cut_at > limit_s / 2, "they did not wait at all: was the link cut?"
    assert process.wait(timeout=LIMIT_S) != 0
    hosts.restore("h2")
    assert "no progress for" in (tmp_path / "output").read_text()
    lost = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])["step"]
    again = start()
    assert again.wait(timeout=LIMIT_S) == 0, (tmp_path / "output").read_text()
    (resumed,) = events(run_dir, "resumed")
    assert lost - 4 - 4 <= resumed["step"] <= lost
    assert [row["step"] for row in steps_of(run_dir)] == list(range(1, STEPS + 1))


@pytest.mark.slurm
@pytest.mark.slow
def test_a_plan_is_ready_to_submit(
    slurm: SlurmLab,
    digits: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches files of launch/plan.py that need a hand before SLURM takes them. Two nodes, TP 2."""
    out, run_dir = tmp_path / "plan", tmp_path / "run"
    monkeypatch.chdir(ROOT)
    words = ["--config", "launch/recipes/digits.yaml", "--gpu", "cpu", "--out", str(out)]
    words += ["--nodes", "2", "--gpus_per_node", "2", "--cores_per_gpu", "1"]
    words += ["--deepspeed_config", "ds_configs/zero3.json", "--only", "tp=2,stage=3,micro_batch=128"]
    assert plan.main(words) == 0
    own = flags(digits, run_dir)[2:]  # the JSON is the plan's
    del own[own.index("--config") : own.index("--config") + 2]  # and so is the recipe
    job = slurm.sbatch(out / "train.sbatch", *own, options=[f"--output={tmp_path}/%j.log"], cwd=ROOT)
    ended = slurm.wait(job, timeout_s=LIMIT_S)
    assert ended["JobState"] == "COMPLETED", slurm.output(job)
    assert "dp 2 x tp 2" in slurm.output(job)
    check_equal(run_dir, whole)
