"""One job on SLURM and one on two hosts: `make test-smoke`; `make test-cluster` holds the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import LIMIT_S, NODES, SBATCH, check_equal, flags, on_hosts
from tests.lab.hosts import HostsLab
from tests.lab.slurm import SlurmLab
from tests.launch.commands import ROOT


@pytest.mark.slurm
@pytest.mark.slow
def test_the_shipped_script_runs_a_job_on_two_nodes(
    slurm: SlurmLab, digits: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Catches a shipped script, or a rendezvous, that does not work on two nodes. TP 2, two tasks a node."""
    job = slurm.sbatch(
        SBATCH,
        *flags(digits, tmp_path / "run", "--tensor_parallel_size", "2"),
        options=[*NODES, "--ntasks-per-node=2", f"--output={tmp_path}/%j.log"],
        cwd=ROOT,
    )
    assert slurm.wait(job, timeout_s=LIMIT_S)["JobState"] == "COMPLETED", slurm.output(job)
    assert "dp 2 x tp 2" in slurm.output(job)
    check_equal(tmp_path / "run", whole)


@pytest.mark.dist
@pytest.mark.slow
def test_the_launcher_runs_a_job_on_two_hosts(
    hosts: HostsLab, digits: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Catches ranks on other hosts that do not start, meet or train. deepspeed --hostfile over pdsh."""
    output = tmp_path / "output"
    start = on_hosts(hosts, tmp_path, flags(digits, tmp_path / "run"))
    with output.open("w") as log:
        job = hosts.head(start, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        assert job.wait(timeout=LIMIT_S) == 0, output.read_text()
    assert "dp 2 x tp 1" in output.read_text()
    check_equal(tmp_path / "run", whole)
