"""What communication adds to a training step: real ranks over gloo, against the same number of processes that
each do one rank's work on a fake mesh, whose collectives move nothing.

Both sets stay alive and take turns, so they share whatever else the machine does. On a CPU ranks talk through
memory, with the very cores that compute: a share here says what the layers wait for, not what a GPU would.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from megavit.bench.peers import Shape
from megavit.bench.rounds import Spread, spread
from megavit.parallel import linear
from megavit.parallel.mesh import Mesh

_BLOCK = 7_100_000  # elements of a block at width 768


@dataclass(frozen=True)
class Way:
    """A layout, settings of `zero_optimization`, and in how many chunks a block's output is reduced."""

    tp_size: int
    dp_size: int
    zero: dict[str, Any] = field(default_factory=dict)
    chunks: int = linear.REDUCE_CHUNKS

    @property
    def ranks(self) -> int:
        return self.tp_size * self.dp_size


_SHARDED = {"stage": 3, "stage3_prefetch_bucket_size": int(0.9 * _BLOCK), "reduce_bucket_size": _BLOCK}
_SHARDED |= {"stage3_max_reuse_distance": _BLOCK, "stage3_max_live_parameters": 3 * _BLOCK}

WAYS = {
    "dp2-zero2": Way(1, 2, {"stage": 2}),
    "dp2-zero3": Way(1, 2, _SHARDED),
    "dp2-zero3-no-prefetch": Way(1, 2, _SHARDED | {"stage3_prefetch_bucket_size": 0}),
    "dp2-zero3-large-buckets": Way(1, 2, {"stage": 3}),
    "dp2-zero3-no-overlap": Way(1, 2, _SHARDED | {"overlap_comm": False}),
    "dp2-zero3-nothing-persists": Way(1, 2, _SHARDED | {"stage3_param_persistence_threshold": 0}),
    "dp4-zero3": Way(1, 4, _SHARDED),
    "tp2": Way(2, 1, {"stage": 0}),
    "tp2-one-chunk": Way(2, 1, {"stage": 0}, chunks=1),
    "tp2-four-chunks": Way(2, 1, {"stage": 0}, chunks=4),
    "tp4": Way(4, 1, {"stage": 0}),
    "dp2-tp2-zero3": Way(2, 2, _SHARDED),
}


@dataclass(frozen=True)
class Found:
    """Seconds of a step of the slowest rank, talking and alone, and the share of the step that talking
    takes; bytes of a rank's collectives."""

    way: Way
    talking_s: float
    alone_s: float
    exposed: Spread
    megabytes: float


def measure(shape: Shape, way: Way, rounds: int, steps: int) -> Found:
    """Alternating rounds of `steps` optimizer steps on real ranks and on lonely ones. `shape.batch` images a
    rank and step."""
    context = multiprocessing.get_context("spawn")
    worlds = {talking: _Ranks(context, shape, way, talking) for talking in (True, False)}
    try:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 1):
            for talking in (True, False) if number % 2 else (False, True):
                taken = worlds[talking].take(steps)
                if number:
                    seconds[talking].append(taken)
        megabytes = worlds[True].bytes / 1e6
    finally:
        for world in worlds.values():
            world.close()
    pairs = zip(seconds[True], seconds[False], strict=True)
    exposed = spread([1 - alone / talking for talking, alone in pairs])
    return Found(way, statistics.median(seconds[True]), statistics.median(seconds[False]), exposed, megabytes)


class _Ranks:
    """The processes of one world, which take steps when they are told to."""

    def __init__(self, context: Any, shape: Shape, way: Way, talking: bool):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1] if talking else 0
        self._processes, self._ends = [], []
        for rank in range(way.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, shape, way, rank, port), daemon=True)
            process.start()
            theirs.close()  # or the end of a process would not be seen
            self._processes.append(process)
            self._ends.append(mine)
        self.bytes = max(self._receive())

    def take(self, steps: int) -> float:
        """Seconds a step of the slowest rank."""
        for end in self._ends:
            end.send(steps)
        return max(self._receive()) / steps

    def _receive(self) -> list[float]:
        try:
            return [end.recv() for end in self._ends]
        except EOFError as error:
            raise ValueError("a rank ended, see its message above") from error

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(end: Connection, shape: Shape, way: Way, rank: int, port: int) -> None:
    from megavit.bench.trainer import bench_inputs, bench_run
    from megavit.parallel.rendezvous import announce_launch
    from megavit.scale.communication import CollectiveCounter
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine

    torch.set_num_threads(1)
    linear.REDUCE_CHUNKS = way.chunks
    if port:
        announce_launch(way.ranks, rank, port)
        mesh = Mesh.from_environment(way.tp_size)
    else:
        mesh = Mesh.fake(way.tp_size, way.dp_size)
    run = replace(bench_run(shape), tensor_parallel_size=way.tp_size)
    config = {
        "train_batch_size": shape.batch * way.dp_size,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": way.zero,
    }
    engine = Engine(run, resolve_ds_config(config, way.dp_size, "cpu"), mesh)
    inputs = bench_inputs(run, shape, mesh)

    def step() -> None:
        engine.train_step([inputs], inputs.weights.sum() * way.dp_size, 1e-4)

    for _ in range(3):  # DeepSpeed learns the order of the modules in the first two
        with CollectiveCounter() as counter:
            step()
    end.send(float(sum(counter.bytes.values())))
    while True:
        steps = end.recv()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        end.send(time.perf_counter() - started)


HEADER = "| layout and settings | ranks | MB a rank | s a step | alone | exposed share |\n" + "|---" * 6 + "|"


def to_markdown(name: str, found: Found) -> str:
    return (
        f"| {name} | {found.way.ranks} | {found.megabytes:.0f} | {found.talking_s:.3f} | {found.alone_s:.3f} "
        f"| {found.exposed} |"
    )


def to_json(name: str, found: Found) -> dict[str, Any]:
    return vars(found) | {"name": name, "way": vars(found.way), "exposed": found.exposed._asdict()}
