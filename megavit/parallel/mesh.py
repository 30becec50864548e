"""The rank grid: which ranks share a model copy (TP) and which share its weights' ZeRO partition (DP).

TP is the inner axis, so consecutive ranks, which sit on one node, form a TP group. A `Mesh` is passed as an
argument; there are no globals. It doubles as DeepSpeed's `mpu`. Only this file reads RANK, WORLD_SIZE and
LOCAL_RANK.

    world 8, tp_size 2:        tp_rank 0  tp_rank 1
                    dp_rank 0      0          1
                    dp_rank 1      2          3
                    dp_rank 2      4          5
                    dp_rank 3      6          7
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Building DeepSpeed's ops and writing large exports keep some ranks waiting for others for minutes.
_PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this rank in the (DP, TP) grid and the two process groups through it (None without
    processes)."""

    tp_size: int = 1
    tp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """A grid of one rank that needs no process group; runs the very same layers."""
        return Mesh(device=torch.device(device))

    @staticmethod
    def from_environment(tp_size: int = 1) -> Mesh:
        """Join the process group that the launcher (`deepspeed`, `torchrun`, or none) describes, and build
        the grid.

        Raises ValueError when `tp_size` does not divide the number of ranks, or a node has fewer GPUs than
        ranks. Collective over all ranks; opens two process groups per grid row and column.
        """
        world_size = int(os.environ.setdefault("WORLD_SIZE", "1"))
        global_rank = int(os.environ.setdefault("RANK", "0"))
        local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
        if world_size % tp_size:
            raise ValueError(
                f"--tensor_parallel_size {tp_size} does not divide the {world_size} ranks of this launch; "
                f"start a multiple of {tp_size} ranks (deepspeed --num_accelerators N) or lower it"
            )
        device = _device(local_rank)
        if device.type == "cpu":
            _share_cores()
        if not dist.is_initialized():
            _init_process_group(device, global_rank, world_size)
        mesh = Mesh(
            tp_size=tp_size,
            tp_rank=global_rank % tp_size,
            dp_size=world_size // tp_size,
            dp_rank=global_rank // tp_size,
            local_rank=local_rank,
            device=device,
        )
        return mesh._with_groups()

    def _with_groups(self) -> Mesh:
        # Every rank creates every group, in one order: new_group is collective over the world.
        groups: dict[tuple[str, int], Any] = {}
        for dp_rank in range(self.dp_size):
            groups["tp", dp_rank] = _new_group([dp_rank * self.tp_size + t for t in range(self.tp_size)])
        for tp_rank in range(self.tp_size):
            groups["dp", tp_rank] = _new_group([d * self.tp_size + tp_rank for d in range(self.dp_size)])
        return replace(self, tp_group=groups["tp", self.dp_rank], dp_group=groups["dp", self.tp_rank])

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size

    @property
    def global_rank(self) -> int:
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes."""
        return self.global_rank == 0

    def broadcast(self, value: Any) -> Any:
        """The main rank's `value` (any picklable object) on every rank; collective over the world."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order, on every rank; collective over the
        world."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """`function()`, run on the main rank only, on every rank; collective over the world.

        A ValueError or OSError is raised on every rank, so that none waits for the others.
        """
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except (ValueError, OSError) as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def describe(self) -> str:
        return f"{self.world_size} rank(s) = dp {self.dp_size} x tp {self.tp_size} on {self.device.type}"

    # What DeepSpeed asks of an `mpu`.

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.dp_group


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start one rank per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _new_group(ranks: list[int]) -> Any:
    return dist.new_group(ranks, timeout=_PROCESS_GROUP_TIMEOUT)  # the default is not the world's


def _share_cores() -> None:
    """Divide the node's cores among its ranks, unless OMP_NUM_THREADS says otherwise: more threads than cores
    crawl."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))


def _init_process_group(device: torch.device, global_rank: int, world_size: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # No launcher, or one rank: an in-process store needs no port, so runs side by side never collide.
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_PROCESS_GROUP_TIMEOUT)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but {' and '.join(missing)} is not set; start with `deepspeed`"
        )
    dist.init_process_group(backend, rank=global_rank, world_size=world_size, timeout=_PROCESS_GROUP_TIMEOUT)
