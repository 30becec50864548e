"""Fixtures shared by all tests; real shards, real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Several ranks share two cores; must be set before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the digits shards, as `launch/shards.py digits` writes them."""
    from megavit.data.write import digits_splits, write_splits

    folder = tmp_path_factory.mktemp("digits")
    write_splits(digits_splits(), folder, shard_size=100, workers=2)
    return folder
