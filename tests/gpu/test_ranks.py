"""Ranks on a GPU: groups of NCCL, the fake group of rehearsals, and two ranks that share the one GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavit.data.device import to_device
from megavit.model.vit import MegaVit
from megavit.parallel.collectives import gather_over_world, max_over_tp, sum_over_dp, sum_over_world
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from tests.gpu.devices import SMALL, close, fill_head, on_both, pictures

_TIMEOUT_S = 200.0
_context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked


def in_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` in fresh processes; their results in rank order."""
    with _context.Pool(count) as pool:
        pending = [pool.apply_async(function, (rank, *arguments)) for rank in range(count)]
        return [one.get(_TIMEOUT_S) for one in pending]


def collectives_alone(rank: int, device: str) -> list[float]:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        os.environ[name] = str(value)
    mesh = Mesh.from_environment(1)
    assert mesh.device.type == device
    assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
    x = torch.arange(3.0, device=mesh.device)
    found = [
        sum_over_world(mesh, x),
        sum_over_dp(mesh, x),
        max_over_tp(mesh, x),
        gather_over_world(mesh, x)[0],
    ]
    # What a single rank leaves out: the very calls.
    for group in (None, mesh.tp_group, mesh.dp_group):
        total = x.clone()
        dist.all_reduce(total, group=group)
        pieces = [torch.empty_like(x)]
        dist.all_gather(pieces, total, group=group)
        found.append(pieces[0])
    whole = torch.empty_like(x)
    dist.all_gather_into_tensor(whole, x, group=mesh.dp_group)
    dist.reduce_scatter_tensor(whole, x.clone(), group=mesh.dp_group)
    assert not mesh.any(False) and mesh.gather_for_io("me") == ["me"]
    return [float((one - x).abs().max()) for one in (*found, whole)]


@on_both
def test_groups_of_one_rank(device: str) -> None:
    """Catches a backend without one of the collectives that a run uses."""
    assert in_processes(1, collectives_alone, device) == [[0.0] * 8]


def fake_step(rank: int, device: str) -> bool:
    mesh = Mesh.fake(2, 4, device)
    model = MegaVit.from_config(SMALL, mesh=mesh, recompute="selective").to(device, torch.bfloat16)
    images, labels = pictures(2, device)
    logits = model(images.bfloat16(), local_logits=True)
    F.cross_entropy(logits, labels % logits.shape[1]).backward()
    return all(part.grad is not None and part.grad.device.type == device for part in model.parameters())


@on_both
def test_a_rank_of_a_fake_grid(device: str) -> None:
    """Catches rehearsals whose collectives leave the device."""
    assert in_processes(1, fake_step, device) == [True]


def tensor_parallel(rank: int, size: int, store: str, device: str, policy: str) -> dict[str, torch.Tensor]:
    """Logits of a model over `size` ranks of gloo, which serves one GPU to them all, and the gradients of
    this rank's shards; of one rank the same shards of its gradients."""
    mesh = Mesh.single(device)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        alone = [dist.new_group([one]) for one in range(size)][rank]
        mesh = Mesh(
            tp_size=size,
            tp_rank=rank,
            device=torch.device(device),
            tp_group=dist.group.WORLD,
            dp_group=alone,
        )
    model = fill_head(MegaVit.from_config(SMALL, mesh=mesh, seed=3, recompute=policy).to(device))  # type: ignore
    images, labels = pictures(4, device)
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    found = {"logits": logits.detach().cpu()}
    for name, part in model.named_parameters():
        assert part.grad is not None
        found[name] = part.grad.cpu()
        if size == 1:
            found[name] = layout_of(part).take(found[name], rank, 2)
    return found


@pytest.mark.parametrize(
    ("device", "policy"),
    [
        ("cpu", "selective"),
        *(pytest.param("cuda", policy, marks=pytest.mark.gpu) for policy in ("none", "selective", "full")),
    ],
)
def test_two_ranks_on_one_device_are_one_model(device: str, policy: str, tmp_path: Path) -> None:
    """Catches collectives that overtake the kernels whose results they send: wrong sums, on a GPU only."""
    two = in_processes(2, tensor_parallel, 2, str(tmp_path / "store"), device, policy)
    for rank, found in enumerate(two):
        expected = tensor_parallel(rank, 1, "", device, policy)
        different = [name for name in expected if not close(found[name], expected[name], 1e-3)]
        assert different == []


@on_both
def test_pinned_copies_arrive_whole(device: str) -> None:
    """Catches pictures that are used before they are there, or whose memory is used again too early."""
    target, sums = torch.device(device), []
    for number in range(20):
        images = torch.full((64, 64, 64, 3), number, dtype=torch.uint8)
        if device == "cuda":
            torch.cuda._sleep(2_000_000)  # the device is busy, the host is ahead
        copy = to_device(images, target)
        sums.append(copy.double().mean())
        del copy
    assert torch.stack(sums).tolist() == list(range(20))


@pytest.mark.gpu
def test_a_pinned_copy_does_not_wait() -> None:
    """Catches a copy that makes the host wait for the device."""
    device, images = torch.device("cuda"), torch.zeros(1 << 20, dtype=torch.uint8)
    to_device(images, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        to_device(images, device)
        to_device(images.pin_memory(), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
