"""Some of the faults that `python -m tests.faults` injects; the others have tests of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import Faults
from tests.jobs import EVERY

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"), saves=2)


def test_kill_a_rank(faults: Faults) -> None:
    """Catches data workers, and with them the forkserver and the resource tracker, that stay for ever when
    their rank is killed, and steps that are lost or done otherwise after it."""
    outcome = faults.kill_rank()
    assert outcome.equal == "yes" and outcome.lost_steps <= 3 and outcome.gone_s is not None, outcome


def test_kill_while_saving(faults: Faults) -> None:
    """Catches a half-written checkpoint that counts, and one that is lost by it."""
    outcome = faults.kill_in_save()
    assert outcome.equal == "yes" and outcome.lost_steps <= 3 and outcome.gone_s is not None, outcome


@pytest.fixture(scope="module", params=["depth", "segment"])
def dense(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Faults:
    return Faults(tmp_path_factory.mktemp(request.param), saves=2, task=request.param)


@pytest.mark.parametrize("fault", ["kill_rank", "kill_in_save", "flipped_bit"])
def test_heads_on_a_frozen_trunk(dense: Faults, fault: str) -> None:
    """Catches a decoder, or its running statistics, that come back otherwise than a classifier does: after a
    kill, after one in the middle of a save, and from a damaged checkpoint."""
    outcome = getattr(dense, fault)()
    # From the checkpoint before the damaged one it is as many steps more.
    lost = 3 + EVERY * (fault == "flipped_bit")
    assert outcome.equal == "yes" and outcome.lost_steps <= lost and outcome.gone_s is not None, outcome


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(faults: Faults) -> None:
    """Catches a run that a full disk ends, by a save or by bad samples that cannot be recorded, a log that it
    tears, and data workers that stay after a normal end."""
    outcome = faults.full_disk()
    assert outcome.equal == "yes" and outcome.gone_s is not None, outcome


def test_nothing_is_left_in_shared_memory() -> None:
    """Catches ops that fill /dev/shm with every run."""
    assert not list(Path("/dev/shm").glob("deepspeed_*"))
