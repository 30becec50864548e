"""Every launcher's variables become the same five."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavit.parallel.rendezvous import Rank, join_launch, threads_per_rank

NAMES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
)
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_NTASKS": "99",
}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that no launcher has touched, and no scontrol."""
    for name in [
        *NAMES,
        *(name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_"))),
    ]:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))


def setenv(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_no_launcher_is_one_rank() -> None:
    """Catches a start by hand that asks for variables."""
    assert join_launch() == Rank(1, 0, 0, 1)
    assert os.environ["LOCAL_RANK"] == "0" and "MASTER_ADDR" not in os.environ


def test_srun_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the allocation's numbers taken for the step's, and a port that two jobs share."""
    setenv(monkeypatch, STEP)
    assert join_launch() == Rank(20, 9, 1, 8)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("9", "20", "8")
    assert os.environ["MASTER_ADDR"] == "gpu007"
    port = os.environ.pop("MASTER_PORT")
    for name in NAMES:
        os.environ.pop(name, None)
    setenv(monkeypatch, {"SLURM_JOB_ID": "1235"})
    join_launch()
    assert os.environ["MASTER_PORT"] != port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[3,7-9]", "gpu3"),
        ("a,b[1-2]", "a"),
        ("rack[01-02]-gpu", "rack01-gpu"),
        ("rack[01-02]-gpu,z1", "rack01-gpu"),
    ],
)
def test_first_host_of_a_node_list(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    """Catches ranks that meet at a host that does not exist."""
    setenv(monkeypatch, STEP | {"SLURM_STEP_NODELIST": nodes})
    join_launch()
    assert os.environ["MASTER_ADDR"] == first


def test_scontrol_gives_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches names that do not resolve where SLURM knows the address."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "NodeName=$4 Arch=x NodeAddr=10.1.2.3 CPUTot=8"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    setenv(monkeypatch, STEP)
    join_launch()
    assert os.environ["MASTER_ADDR"] == "10.1.2.3"


def test_a_batch_script_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `python launch/train.py` in a batch script waiting for ranks that nobody starts."""
    setenv(monkeypatch, {name: value for name, value in STEP.items() if "STEP" not in name})
    assert join_launch() == Rank(1, 0, 0, 1)


def test_deepspeed_inside_an_allocation_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SLURM's numbers overriding those of a launcher started within it."""
    setenv(monkeypatch, STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"})
    assert join_launch() == Rank(2, 1, 1, 2)


def test_open_mpi_and_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that all call themselves 0, and several hosts without a meeting point passing
    unnoticed."""
    ompi = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}
    setenv(monkeypatch, {f"OMPI_COMM_WORLD_{name}": value for name, value in ompi.items()})
    assert join_launch() == Rank(4, 3, 3, 4)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 10_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    for name in [*NAMES, *(f"OMPI_COMM_WORLD_{name}" for name in ompi)]:
        os.environ.pop(name, None)
    setenv(monkeypatch, {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    assert join_launch() == Rank(4, 3, 1, 2)
    assert "MASTER_ADDR" not in os.environ


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that each take all cores."""
    assert threads_per_rank(1) == os.cpu_count()
    assert threads_per_rank(10_000) == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert threads_per_rank(8) == 12
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(8) is None


def test_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from int()."""
    setenv(monkeypatch, {"RANK": "zero", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK must be a number, got 'zero'"):
        join_launch()
