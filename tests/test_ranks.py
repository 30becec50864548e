"""The processes that other tests run their ranks in."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavit.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.train.test_engine import RUN, ds_config, run_engine

pytestmark = pytest.mark.dist


def process() -> int:
    return os.getpid()


def fail(last: int, how: str) -> None:
    """The last rank fails while the others wait for it."""
    mesh = Mesh.from_environment()
    if mesh.global_rank != last:
        dist.barrier()
    if how == "raise":
        raise LookupError("this is the reason")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("how", "words"), [("raise", "LookupError: this is the reason"), ("die", "with -9")])
def test_a_rank_that_fails_is_named_and_leaves_no_trace(how: str, words: str) -> None:
    """Catches a test that waits for ever for a dead rank, and ranks still in a failed task at the next."""
    before = run_ranks(2, process)
    with pytest.raises(AssertionError, match=rf"(?s)rank \d of 2 failed:.*{words}"):
        run_ranks(2, fail, 1, how)
    assert not set(run_ranks(2, process)) & set(before)


def test_ranks_stay_unless_they_must_not() -> None:
    """Catches processes started for every task, and tasks with `fresh` that share theirs."""
    first = run_ranks(1, process)
    assert run_ranks(2, process)[0] == first[0]
    assert not set(run_ranks(2, process, fresh=True)) & set(run_ranks(2, process))


def change() -> None:
    Mesh.from_environment()
    os.environ["LEFT_BEHIND"] = "yes"
    os.chdir("/")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.manual_seed(7)


def state() -> list[Any]:
    stays = os.environ.get("LEFT_BEHIND"), os.getcwd(), signal.getsignal(signal.SIGUSR1).name
    return [dist.is_initialized(), *stays, torch.rand(1).item()]


def test_a_task_finds_its_process_as_the_first_one_did() -> None:
    """Catches tests whose result depends on those that ran before them."""
    expected = run_ranks(1, state, fresh=True)
    run_ranks(1, change)
    assert run_ranks(1, state) == expected


def test_engines_do_not_depend_on_the_tasks_before() -> None:
    """Catches what DeepSpeed keeps in its modules: groups that are gone, numbers that ranks compare."""
    raw = ds_config(3, micro_batch=2)
    expected = run_ranks(2, run_engine, 2, RUN, raw, fresh=True)
    run_ranks(1, run_engine, 1, RUN, ds_config(2))
    assert run_ranks(2, run_engine, 2, RUN, raw) == expected
