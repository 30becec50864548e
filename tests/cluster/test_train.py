"""The trainer on a real SLURM, on hosts with a network between them, and under every launcher."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.hosts import HostsLab
from tests.lab.slurm import SlurmLab
from tests.train.runs import log_of, steps_of

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
BIN = Path(sys.executable).parent
STEPS = 24
NODES = ["--nodes=2", "--gpus-per-node=0", "--exclusive"]


def flags(digits: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of `STEPS` steps whose losses do not depend on the layout."""
    return [
        *("--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json"), "--run_dir", str(run_dir)),
        *("--config", str(ROOT / "launch" / "recipes" / "digits.yaml")),
        *("--data.shards", f"{digits}/train-*.tar", "--data.val_shards=", "--eval_every", "0"),
        *("--max_steps", str(STEPS), "--log_every", "1", "--schedule.warmup_steps", "5", *more),
    ]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run on one rank that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(
        [sys.executable, TRAIN, *flags(digits, run_dir)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return steps_of(run_dir)


def check_equal(run_dir: Path, whole: list[dict[str, Any]]) -> None:
    found = steps_of(run_dir)
    assert [row["step"] for row in found] == [row["step"] for row in whole]
    for mine, theirs in zip(found, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine["step"]


def wait_until(ready: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
    return found


def reached(run_dir: Path, step: int) -> bool:
    return (run_dir / "log.jsonl").exists() and any(row["step"] >= step for row in steps_of(run_dir))


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in log_of(run_dir) if row.get("event") == kind]


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
    wait_until(lambda: reached(run_dir, 4), slurm.output(job))
    slurm.scancel("--batch", "--signal=USR1", job)
    ended = slurm.wait(job, timeout_s=180)
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
    wait_until(lambda: reached(run_dir, 3), slurm.output(job))
    high = slurm.sbatch(urgent, options=["--partition=high", "--nodes=2", "--exclusive"])
    assert slurm.wait(high, timeout_s=90)["JobState"] == "COMPLETED", slurm.output(job)
    ended = slurm.wait(job, timeout_s=180)
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
            *("--time=1", "--signal=B:USR1@40"),
        ],
        cwd=ROOT,
    )
    slurm.wait_until(job, lambda state: state["Restarts"] == "1", timeout_s=120)
    wait_until(lambda: events(run_dir, "resumed"), slurm.output(job))
    # The first of each: by now the next life may have been told as well.
    stopped, resumed = events(run_dir, "stopped")[0], events(run_dir, "resumed")[0]
    assert 0 < stopped["step"] == resumed["step"], slurm.output(job)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (Debian: openmpi-bin)")
def test_mpirun(digits: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """Catches ranks that each think they are alone."""
    run_dir = tmp_path / "run"
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, TRAIN]
    done = subprocess.run(
        [*command, *flags(digits, run_dir)], cwd=tmp_path, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) = dp 2 x tp 1" in done.stdout
    check_equal(run_dir, whole)


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun(digits: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    """Catches a launcher among the promised ones that does not start the script."""
    run_dir = tmp_path / "run"
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", TRAIN]
    done = subprocess.run(
        [*command, *flags(digits, run_dir, "--tensor_parallel_size", "2")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(run_dir, whole)


@pytest.mark.dist
@pytest.mark.slow
def test_a_cut_host_ends_the_job_and_the_next_start_goes_on(
    hosts: HostsLab, digits: Path, tmp_path: Path
) -> None:
    """Catches processes that wait for ever for a host that is gone, and a run that cannot be picked up.
    deepspeed --hostfile over pdsh, two hosts."""
    run_dir = tmp_path / "run"
    limit_s = 15
    variables = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))
    launch = [str(BIN / "deepspeed"), "--hostfile", str(hosts.hostfile(1)), "--master_port", "29611", TRAIN]
    slow = ["--checkpoint.every", "4", "--timeout_s", str(limit_s), "--model.depth", "12"]

    def start() -> subprocess.Popen[str]:
        command = [*launch, *flags(digits, run_dir, *slow)]
        # pdsh hands the command to a shell on the host, which would expand the pattern.
        command[command.index("--data.shards") + 1] = f"'{digits}/train-*.tar'"
        log = (tmp_path / "output").open("a")
        return hosts.head(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, text=True)

    def ranks() -> list[int]:
        return [pid for host in hosts.hosts for pid in hosts.pids(host, "launch/train.py")]

    process = start()
    wait_until(lambda: (run_dir / "checkpoints" / "latest").exists(), (tmp_path / "output").read_text())
    hosts.cut("h2")
    cut_at = time.monotonic()
    wait_until(lambda: not ranks(), "the ranks of a job with a cut host", limit_s + 60)
    assert time.monotonic() - cut_at > limit_s / 2, "they did not wait at all: was the link cut?"
    assert process.wait(timeout=60) != 0
    hosts.restore("h2")
    assert "no progress for" in (tmp_path / "output").read_text()
    lost = json.loads((run_dir / "log.jsonl").read_text().splitlines()[-1])["step"]
    again = start()
    assert again.wait(timeout=180) == 0, (tmp_path / "output").read_text()
    (resumed,) = events(run_dir, "resumed")
    assert lost - 4 - 4 <= resumed["step"] <= lost
    assert [row["step"] for row in steps_of(run_dir)] == list(range(1, STEPS + 1))


@pytest.mark.slurm
@pytest.mark.slow
def test_a_plan_is_ready_to_submit(
    slurm: SlurmLab, digits: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Catches files of launch/plan.py that need a hand before SLURM takes them. Two nodes, TP 2."""
    out, run_dir = tmp_path / "plan", tmp_path / "run"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "launch/plan.py",
                "--config",
                "launch/recipes/digits.yaml",
                "--gpu",
                "cpu",
                "--out",
                str(out),
            ),
            *("--nodes", "2", "--gpus_per_node", "2", "--cores_per_gpu", "1"),
            *("--deepspeed_config", "ds_configs/zero3.json", "--only", "tp=2,stage=3,micro_batch=128"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    own = flags(digits, run_dir)[2:]  # the JSON is the plan's
    del own[own.index("--config") : own.index("--config") + 2]  # and so is the recipe
    job = slurm.sbatch(out / "train.sbatch", *own, options=[f"--output={tmp_path}/%j.log"], cwd=ROOT)
    ended = slurm.wait(job, timeout_s=180)
    assert ended["JobState"] == "COMPLETED", slurm.output(job)
    assert "dp 2 x tp 2" in slurm.output(job)
    check_equal(run_dir, whole)
