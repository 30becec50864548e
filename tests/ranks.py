"""Runs a function in several real processes that form a gloo process group."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "megavit.train.loop"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `count` ranks at once; returns their results in rank order.

    `function` must be defined at a test module's top level. A rank's exception is raised here with its
    traceback.
    """
    queue = _context.Queue()
    port = free_port()
    processes = [
        _context.Process(target=_rank_main, args=(queue, rank, count, port, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(count):
            rank, error, result = queue.get(timeout=180)
            if error:
                raise AssertionError(f"rank {rank} of {count} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == count else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(count)]


def _rank_main(
    queue: Any, rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "MASTER_PORT": port,
        "LOCAL_WORLD_SIZE": count,
    }
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        queue.put((rank, None, function(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
