"""Fixtures shared by all tests; real shards, real processes.

`make test` runs the tests marked `dist` one after the other, and then the others two files at a time.
So a test in which several ranks work at once is marked `dist`, and any other keeps to its `tmp_path` and to
ports that it asked for (`tests.ranks.free_port`), and counts its own process and those below it only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Several ranks share two cores; must be set before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A command that a test runs in this process joins a process group, and says so in the environment: the
    next test must not find itself in it."""
    environment, was_in_one = dict(os.environ), torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not was_in_one:
        torch.distributed.destroy_process_group()
    if "WORLD_SIZE" in os.environ and "WORLD_SIZE" not in environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the digits shards, as `launch/shards.py digits` writes them."""
    from megavit.data.write import digits_splits, write_splits

    folder = tmp_path_factory.mktemp("digits")
    write_splits(digits_splits(), folder, shard_size=100, workers=2)
    return folder
