"""Runs a function in several real processes that form a gloo process group.

The processes stay for the whole pytest run and take one task after the other, since a process that has
trained once starts the next training in half the time. `fresh=True` gives a task processes of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "megavit.train.loop", "pytest"])

_TIMEOUT_S = 300.0  # for one task, on a machine several times slower than this one
# An engine of DeepSpeed is never freed, nor are the groups that it holds, of some three threads each.
_MOST_TASKS = 20
# Below the ports that kernels give to those who do not ask for one, so that no connection takes it meanwhile.
_FIRST_PORT, _LAST_PORT = 10_000, 30_000


def free_port() -> int:
    """A port for a launcher that must be told one."""
    while True:
        port = random.SystemRandom().randrange(_FIRST_PORT, _LAST_PORT)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> list[Any]:
    """`function(*arguments)` on `count` ranks at once; returns their results in rank order.

    `function` must be defined at a test module's top level. A rank's exception is raised here with its
    traceback. `fresh` is for functions that leave their process changed (patched modules, threads), that end
    it, or that look at what it has imported.
    """
    global _pool
    pool = _Pool(stays=False) if fresh else _pool or _Pool(stays=True)
    if not fresh:
        _pool = None  # it comes back if all goes well: after a failure some ranks may still wait for others
    try:
        results = pool.run(count, function, arguments)
        if not fresh and pool.tasks < _MOST_TASKS:
            _pool = pool
        return results
    finally:
        if _pool is not pool:
            pool.close()


class _Pool:
    """Rank processes, started when they are first needed."""

    def __init__(self, stays: bool):
        self._stays, self.tasks = stays, 0
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, count: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        from torch.distributed import TCPStore

        self.tasks += 1
        while len(self._processes) < count:
            self._start_one()
        # The ranks meet as under torchrun: at a store which is there before them, on a port that it chose.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, connection in enumerate(self._connections[:count]):
            connection.send((rank, count, store.port, function, arguments))
        return self._results(count, time.monotonic() + _TIMEOUT_S)

    def _start_one(self) -> None:
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_take_tasks, args=(theirs, self._stays))
        process.start()
        theirs.close()  # so that its end is seen here
        self._connections.append(ours)
        self._processes.append(process)

    def _results(self, count: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < count:
            waiting = {self._connections[rank]: rank for rank in range(count) if rank not in results}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"ranks {sorted(waiting.values())} of {count} did not end in time")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    error, results[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join(10)
                    error = f"its process ended with {self._processes[rank].exitcode}"
                if error:
                    raise AssertionError(f"rank {rank} of {count} failed:\n{error}")
        return [results[rank] for rank in range(count)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()  # idle ranks end by this
        for process in self._processes:
            process.kill()
            process.join()


_pool: _Pool | None = None


@atexit.register  # before multiprocessing's own, which would wait for the ranks
def _close_pool() -> None:
    if _pool:
        _pool.close()


def _take_tasks(connection: Connection, stays: bool) -> None:
    """In a rank's process: one task after the other, until the tests have ended."""
    gc.freeze()  # what is imported stays: DeepSpeed collects garbage at each start, a quarter of a second
    start = (
        dict(os.environ),
        os.getcwd(),
        {number: signal.getsignal(number) for number in signal.valid_signals()},
    )
    while True:
        try:
            rank, count, port, function, arguments = connection.recv()
        except EOFError:
            return
        _enter(rank, count, port)
        answer: tuple[str | None, Any]
        try:
            answer = None, function(*arguments)
            if stays:
                _leave(*start)
        except BaseException:
            answer = traceback.format_exc(), None
        connection.send(answer)
        if not stays:
            return


def _enter(rank: int, count: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}


def _leave(environment: dict[str, str], folder: str, handlers: dict[int, Any]) -> None:
    """Take back what a task has made of its process."""
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    comm.cdb = None
    groups._release_process_group_references()
    # DeepSpeed numbers modules and parameters and compares the numbers, but a rank has not been in all tasks.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
