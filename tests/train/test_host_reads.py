"""A training step hardly ever makes the host wait for the device: once, for the step before."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from tests.ranks import run_ranks
from tests.train.host_reads import HostReads
from tests.train.runs import ds_config, small_run, steps_of
from tests.train.test_engine import LR, RUN, WEIGHTS, inputs
from tests.train.test_engine import ds_config as engine_config

BF16 = {"bf16": {"enabled": True}}
READ = "megavit.train.step.result"


def test_the_counter_finds_what_waits() -> None:
    """Catches a counter that sees nothing. (`float` and the like are what the step must not do.)"""
    from megavit.train.step import PendingStep

    x = torch.tensor([1.0, 0.0])
    found = []

    def limit() -> float:
        found.extend([x[0].item(), float(x[1]), bool(x[0]), x.tolist(), x.nonzero(), x[x > 0], x.cpu()])
        found.extend([torch.tensor(1.0, device="cpu"), x + 1, x.sum(), torch.tensor(1.0)])
        return 1.0

    with HostReads() as reads:
        step = PendingStep(Mesh.single(), x[0], {}, limit, None)
        step.decide(x[0])
    assert reads.places == {"megavit.train.step.decide": 8}
    assert not step.result().refused


def places_of_steps(tp_size: int, raws: list[dict[str, Any]]) -> list[tuple[Counter[str], Counter[str]]]:
    """Of the third step of engines with these configurations, when DeepSpeed knows the order of the weights:
    where it reads, and where its result does."""
    from megavit.train.engine import Engine

    mesh, found = Mesh.from_environment(tp_size), []
    for raw in raws:
        run = dataclasses.replace(RUN, tensor_parallel_size=tp_size)
        engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
        for step in range(2):
            engine.train_step(inputs(run, mesh, step, engine.micro_batch), WEIGHTS.sum(), LR)
        parts = inputs(run, mesh, 1, engine.micro_batch)
        with HostReads() as starting:
            pending = engine.start_step(parts, WEIGHTS.sum(), LR, lambda: 1e9)
        with HostReads() as ending:
            pending.result()
        found.append((starting.places, ending.places))
    return found


@pytest.mark.dist
def test_a_step_of_the_engine_reads_nothing() -> None:
    """Catches each number that the engine or DeepSpeed reads before, between or after backward and update:
    the device is idle meanwhile."""
    raws = [engine_config(1), engine_config(2, 4), engine_config(3, 4), engine_config(3, gradient_clipping=0)]
    raws += [engine_config(stage, **BF16) for stage in (1, 2, 3)]
    for starting, ending in run_ranks(1, places_of_steps, 1, raws)[0]:
        assert starting == {} and ending == {READ: 1}
    two = [engine_config(3, 4), engine_config(3, **BF16)]
    for tp_size in (1, 2):
        for found in run_ranks(2, places_of_steps, tp_size, two):
            assert found == [({}, {READ: 1})] * 2


@pytest.mark.dist
def test_an_optimizer_that_cannot_refuse_is_waited_for_once() -> None:
    """Catches an optimizer of DeepSpeed's, or an unfused one, that applies what is refused."""
    unfused = {"optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True, "fused": False}}}
    ((starting, ending),) = run_ranks(1, places_of_steps, 1, [engine_config(3) | unfused])[0]
    assert starting == {READ: 1} and ending == {}


def train_and_count(run: RunConfig, raw: dict[str, Any]) -> tuple[list[Counter[str]], list[str]]:
    """The run, to its end: where each step reads, and the order in which backward passes are queued and steps
    are read."""
    from megavit.train import loop
    from megavit.train.engine import Engine
    from megavit.train.preempt import StopRequest
    from megavit.train.step import PendingStep

    found: list[Counter[str]] = []
    order: list[str] = []
    take, start, read = loop.Trainer._take_step, Engine.start_step, PendingStep.result

    def take_step(trainer: Any, stop: Any) -> Any:
        with HostReads() as reads:
            taken = take(trainer, stop)
        found.append(reads.places)
        return taken

    def start_step(engine: Any, micro_batches: Any, weight: Any, lr: float, limit: Any, read: Any) -> Any:
        def when_queued() -> float:
            order.append("queued")
            return limit()

        return start(engine, micro_batches, weight, lr, when_queued, read)

    def result(step: Any) -> Any:
        if not step.is_read:
            order.append("read")
        return read(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_take_step", take_step)
        patch.setattr(Engine, "start_step", start_step)
        patch.setattr(PendingStep, "result", result)
        loop.train(run, raw, Mesh.from_environment(), StopRequest())
    return found, order


@pytest.mark.dist
def test_a_step_of_a_run_reads_the_one_before(digits: Path, tmp_path: Path) -> None:
    """Catches a loop that waits for what it has just asked for, that reads more than once a step (logged
    steps too), or that loses or repeats the line of a step."""
    changes = {"max_steps": 8, "log_every": 2, "checkpoint__every": 4, "data__workers": 0, "data__mixup": 0.2}
    run = small_run(digits, tmp_path / "run", **changes)
    ((found, order),) = run_ranks(1, train_and_count, run, ds_config(3))
    # The first step is waited for, and those after which the state is saved.
    waited_for = {1, 4, 8}
    expected = []
    for step in range(1, 9):
        expected += (
            ["queued"]
            + ["read"] * (step > 1 and step - 1 not in waited_for)
            + ["read"] * (step in waited_for)
        )
    assert order == expected
    assert [places[READ] for places in found] == [1, 0, 1, 2, 0, 1, 1, 2]
    # Whether to mirror is seen on the host. In its first steps DeepSpeed compares the ranks' orders.
    assert all(places.keys() <= {READ, "megavit.train.inputs.to_samples"} for places in found[4:]), found
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 4, 6, 8]
