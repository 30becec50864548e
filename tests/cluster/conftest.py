"""One SLURM and one set of hosts for all tests here, cleared after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import flags
from tests.lab.hosts import HostsLab, hosts_missing
from tests.lab.slurm import SlurmLab, slurm_missing
from tests.launch.commands import train_with
from tests.train.runs import steps_of


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Two idle nodes."""
    if reason := slurm_missing():
        pytest.skip(reason)
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostsLab]:
    """Two connected hosts."""
    if reason := hosts_missing():
        pytest.skip(reason)
    with HostsLab(tmp_path_factory.mktemp("hosts")) as lab:
        yield lab


@pytest.fixture(scope="session")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run on one rank that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run = train_with(flags(digits, run_dir), run_dir)
    assert run.code == 0, run.output
    return steps_of(run_dir)


@pytest.fixture(autouse=True)
def _leave_nothing_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails half way must not hold nodes, or leave a host cut off, for the next one."""
    yield
    for name in {"slurm", "hosts"} & set(request.fixturenames):
        request.getfixturevalue(name).clear()
