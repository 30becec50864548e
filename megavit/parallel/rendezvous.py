"""What the launcher says of this process: its rank, how many there are, and where they meet.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `srun` and `mpirun`
say it in their own words, which are translated here, into the same variables, since DeepSpeed reads them too.
Only this file reads launchers' variables.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import NamedTuple

_FIRST_PORT, _PORTS = 10_000, 20_000  # below the range that kernels hand out by themselves


class Rank(NamedTuple):
    """This process among those of the launch; `local` counts within its host."""

    world_size: int
    global_rank: int
    local_rank: int
    local_size: int


def join_launch() -> Rank:
    """This process's place, from the variables of the first launcher that has set its own.

    Precedence: RANK (deepspeed, torchrun), Open MPI, MPICH and Intel MPI, SLURM's srun, none (one process).
    The torch names are set for DeepSpeed, MASTER_ADDR and MASTER_PORT unless they are given. Raises
    ValueError when the launcher leaves out what cannot be guessed.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        rank = _ranks("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "OMPI_COMM_WORLD_RANK" in os.environ:
        rank = _ranks(*(f"OMPI_COMM_WORLD_{part}" for part in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")))
        _meet_over_mpi(rank)
    elif "MPI_LOCALRANKID" in os.environ:
        rank = _ranks("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        _meet_over_mpi(rank)
    elif "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:  # a batch script alone is no step
        rank = _ranks("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "")
        rank = rank._replace(local_size=_tasks_on_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")))
        _meet_over_slurm()
    else:
        rank = Rank(1, 0, 0, 1)
    _publish(rank)
    return rank


def fake_launch(world_size: int) -> None:
    """Say that this process is the first of `world_size` ranks which nobody started."""
    _publish(Rank(world_size, 0, 0, 1))


def _publish(rank: Rank) -> None:
    names = {"WORLD_SIZE": rank.world_size, "RANK": rank.global_rank, "LOCAL_RANK": rank.local_rank}
    names |= {"LOCAL_SIZE": rank.local_size, "LOCAL_WORLD_SIZE": rank.local_size}
    for name, value in names.items():
        os.environ.setdefault(name, str(value))


def require_meeting_point(world_size: int) -> None:
    """ValueError when there are several ranks and nobody said where they meet."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise ValueError(
            f"there are {world_size} ranks but {' and '.join(missing)} is not set; start with "
            f"`deepspeed`, `torchrun` or `srun`, or name the first rank's host (mpirun -x MASTER_ADDR=...)"
        )


def threads_per_rank(local_size: int) -> int | None:
    """Threads for one rank's CPU work: what SLURM gave the task, else an equal share of the host's cores;
    more threads than cores crawl. None if OMP_NUM_THREADS decides."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    return int(given) if given else max(1, (os.cpu_count() or 1) // local_size)


def wait_asleep() -> None:
    """Let OpenMP's threads sleep, not spin, while they wait for each other; before torch is loaded.

    A thread that spins takes the core on which the thread that it waits for could run: with one other busy
    process on two cores the demo made 23 to 43 images a second with spinning threads, 394 to 656 with
    sleeping ones. OMP_WAIT_POLICY decides if it is set.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _ranks(size: str, rank: str, local_rank: str, local_size: str) -> Rank:
    def number(name: str, default: int) -> int:
        value = os.environ.get(name, str(default))
        if not value.isdecimal():
            raise ValueError(f"the environment's {name} must be a number, got {value!r}")
        return int(value)

    locals_default = number("LOCAL_SIZE", 1)
    return Rank(number(size, 1), number(rank, 0), number(local_rank, 0), number(local_size, locals_default))


def _meet_over_mpi(rank: Rank) -> None:
    if rank.local_size == rank.world_size:  # one host: the ranks' common parent tells runs apart
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + os.getppid() % _PORTS))


def _meet_over_slurm() -> None:
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if "MASTER_ADDR" not in os.environ and nodes:
        os.environ["MASTER_ADDR"] = _address_of(_first_host(nodes))
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + (7 * job + step) % _PORTS))


def _first_host(nodes: str) -> str:
    """The first name of a SLURM node list, e.g. node[003-007,9] -> node003."""
    name, bracket, numbers = nodes.partition("[")
    if not bracket:
        return nodes.partition(",")[0]
    if "," in name:  # gpu7,node[1-2]
        return name.partition(",")[0]
    suffix = re.match(r"[^,]*", numbers.partition("]")[2])
    return name + re.split(r"[-,\]]", numbers)[0] + (suffix[0] if suffix else "")


def _address_of(node: str) -> str:
    """The node's address as SLURM knows it: names need not resolve. The name itself without scontrol."""
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True)
        if found := re.search(r"\bNodeAddr=(\S+)", shown.stdout):
            return found[1]
    return node


def _tasks_on_node(counts: str) -> int:
    """Tasks of this step on this node, from SLURM's run lengths, e.g. `8(x3),4` is 8, 8, 8, 4."""
    node = int(os.environ.get("SLURM_NODEID", "0"))
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    return 1
