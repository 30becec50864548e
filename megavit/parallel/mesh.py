"""The rank grid: which ranks share a model copy (TP) and which share its weights' ZeRO partition (DP).

TP is the inner axis, so consecutive ranks, which sit on one node, form a TP group. A `Mesh` is passed as an
argument; there are no globals. It doubles as DeepSpeed's `mpu`. What the launcher says of this process is
read in `rendezvous.py`.

    world 8, tp_size 2:        tp_rank 0  tp_rank 1
                    dp_rank 0      0          1
                    dp_rank 1      2          3
                    dp_rank 2      4          5
                    dp_rank 3      6          7
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megavit.parallel.rendezvous import fake_launch, join_launch, require_meeting_point, threads_per_rank

# The longest that a rank waits for others which are still building ops or writing, unless the run says
# otherwise.
_TIMEOUT_S = 1800.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this rank in the (DP, TP) grid and the two process groups through it (None without
    processes).

    `io_group` spans the world over gloo; only what reads or writes for long uses it, one at a time, so its
    collectives never mix with the training's. The collectives of a mesh that `is_fake` move nothing.
    """

    tp_size: int = 1
    tp_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0
    local_rank: int = 0
    local_size: int = 1  # ranks on this host
    device: torch.device = torch.device("cpu")
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    io_group: dist.ProcessGroup | None = None
    is_fake: bool = False

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """A grid of one rank that needs no process group; runs the very same layers."""
        return Mesh(device=torch.device(device))

    @staticmethod
    def from_environment(tp_size: int = 1, timeout_s: float = _TIMEOUT_S) -> Mesh:
        """Join the process group that the launcher (`deepspeed`, `torchrun`, `srun`, `mpirun`, or none)
        describes, and build the grid. A collective that takes longer than `timeout_s` is an error.

        Raises ValueError when `tp_size` does not divide the number of ranks, a node has fewer GPUs than
        ranks, or the launcher leaves something out. Collective over all ranks; opens two process groups per
        grid row and column.
        """
        world_size, global_rank, local_rank, local_size = join_launch()
        timeout = timedelta(seconds=timeout_s)
        if world_size % tp_size:
            raise ValueError(
                f"--tensor_parallel_size {tp_size} does not divide the {world_size} ranks of this launch; "
                f"start a multiple of {tp_size} ranks (deepspeed --num_accelerators N) or lower it"
            )
        device = _device(local_rank)
        if device.type == "cpu":
            if threads := threads_per_rank(local_size):
                torch.set_num_threads(threads)
            _keep_freed_memory()
        if not dist.is_initialized():
            _init_process_group(device, global_rank, world_size, timeout)
        io_group: Any = dist.new_group(timeout=timeout, backend="gloo")
        mesh = Mesh(
            tp_size=tp_size,
            tp_rank=global_rank % tp_size,
            dp_size=world_size // tp_size,
            dp_rank=global_rank // tp_size,
            local_rank=local_rank,
            local_size=local_size,
            device=device,
            io_group=io_group,
        )
        return mesh._with_groups(timeout)

    @staticmethod
    def fake(tp_size: int, dp_size: int, device: torch.device | str = "cpu") -> Mesh:
        """Rank 0 of a grid whose other ranks do not exist, for rehearsals: its collectives move nothing and
        leave their results as they were allocated. Cannot write checkpoints. Once a process."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        fake_launch(tp_size * dp_size)
        dist.init_process_group("fake", rank=0, world_size=tp_size * dp_size, store=FakeStore())
        mesh = Mesh(tp_size=tp_size, dp_size=dp_size, device=torch.device(device), is_fake=True)
        return mesh._with_groups(timedelta(seconds=_TIMEOUT_S))

    def _with_groups(self, timeout: timedelta) -> Mesh:
        # Every rank creates every group, in one order: new_group is collective over the world. A group's
        # default time limit is not the world's.
        groups: dict[tuple[str, int], Any] = {}
        for dp_rank in range(self.dp_size):
            ranks = [dp_rank * self.tp_size + tp_rank for tp_rank in range(self.tp_size)]
            groups["tp", dp_rank] = dist.new_group(ranks, timeout=timeout)
        for tp_rank in range(self.tp_size):
            ranks = [dp_rank * self.tp_size + tp_rank for dp_rank in range(self.dp_size)]
            groups["dp", tp_rank] = dist.new_group(ranks, timeout=timeout)
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

    def gather_over_tp(self, value: Any) -> list[Any]:
        """As `gather`, of the ranks of this TP group; collective over it."""
        if self.tp_size == 1:
            return [value]
        values: list[Any] = [None] * self.tp_size
        dist.all_gather_object(values, value, group=self.tp_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank's `flag` is set, the same answer everywhere; one all-reduce of a number."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def gather_for_io(self, value: Any) -> list[Any]:
        """As `gather`, on the main rank only (others get an empty list), over `io_group`."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.io_group)
        return values

    def broadcast_for_io(self, value: Any) -> Any:
        """As `broadcast`, over `io_group`."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.io_group, device=torch.device("cpu"))
        return box[0]

    def sum_for_io(self, *values: int) -> list[int]:
        """The sums of whole numbers over all ranks, on every rank, over `io_group`."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums, group=self.io_group)
        return sums.tolist()

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
            f"local rank {local_rank} has no GPU: it sees {torch.cuda.device_count()}; start one rank per "
            f"GPU, and let every rank see all of its node's (srun: --gpus-per-node, not --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors for the next step's, up to 1 GiB a tensor. The page faults
    of giving it back and asking again take 5% of a training step at width 1024; at width 384 no gain was seen
    under ZeRO-3 (on an Intel Xeon; see bench/README.md). Nothing without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _init_process_group(device: torch.device, global_rank: int, world_size: int, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # No launcher, or one rank: an in-process store needs no port, so runs side by side never collide.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    require_meeting_point(world_size)
    dist.init_process_group(backend, rank=global_rank, world_size=world_size, timeout=timeout)
