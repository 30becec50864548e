"""The rank grid and its refusals."""

from __future__ import annotations

import pytest

from megavit.parallel.mesh import Mesh
from tests.ranks import run_ranks


def grid(tp_size: int) -> tuple[int, int, int, list[int], list[int]]:
    import torch
    import torch.distributed as dist

    mesh = Mesh.from_environment(tp_size)
    seen = []
    for group in (mesh.tp_group, mesh.dp_group):
        ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, torch.tensor([mesh.global_rank]), group=group)
        seen.append([int(r) for r in ranks])
    assert mesh.broadcast(f"from {mesh.global_rank}") == "from 0"
    return mesh.tp_rank, mesh.dp_rank, mesh.global_rank, seen[0], seen[1]


@pytest.mark.dist
def test_tp_is_the_inner_axis() -> None:
    """Catches swapped axes: TP groups must be consecutive ranks, which share a node."""
    assert run_ranks(4, grid, 2) == [
        (0, 0, 0, [0, 1], [0, 2]),
        (1, 0, 1, [0, 1], [1, 3]),
        (0, 1, 2, [2, 3], [0, 2]),
        (1, 1, 3, [2, 3], [1, 3]),
    ]


def test_tp_size_must_divide_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a hang in new_group where a message is due."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="2 does not divide the 3 ranks"):
        Mesh.from_environment(2)


def test_missing_rendezvous_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches torch's own error, which does not say how to start the program."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        Mesh.from_environment(1)
