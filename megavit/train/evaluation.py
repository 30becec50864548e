"""What a run is worth on its validation sets, while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavit.data.bad import BadSample, BadSamples
from megavit.data.loader import EvalLoader
from megavit.parallel.collectives import sum_over_dp
from megavit.tasks.task import DeviceBatch
from megavit.train.engine import Engine
from megavit.train.inputs import gather_bad, to_samples
from megavit.train.watchdog import Watchdog


class Evaluation(NamedTuple):
    """The task's results on a validation set, how many samples took part, and how many were unusable."""

    results: dict[str, float]
    num_samples: int
    num_bad: int


def evaluate(
    engine: Engine,
    loader: EvalLoader,
    bad_samples: BadSamples,
    step: int,
    watchdog: Watchdog,
    progress: Callable[[int], None] = lambda done: None,
    show: Callable[[DeviceBatch, Any], None] = lambda samples, inputs: None,
) -> Evaluation:
    """The task's results over a whole validation set, exact at any number of ranks: no sample is dropped or
    counted twice. Bad samples are recorded and left out. `progress` is told the number of batches that are
    done, and `show` the first batch and its inputs.
    """
    task, data, mesh = engine.task, engine.run.data, engine.mesh
    fields, sums = task.eval_fields(), _Sums()
    bad: list[BadSample] = []
    for number, batch in enumerate(loader):
        watchdog.at(f"evaluating batch {number} after step {step}")
        samples = to_samples(batch, fields, data, mesh)
        inputs = task.inputs(samples, mesh, training=False)
        if number == 0:
            show(samples, inputs)
        found = engine.evaluate(inputs)
        counts = {"units": task.weight(samples), "usable": samples.weights.sum()}
        sums.add({"loss": found.loss} | found.metrics, counts)
        bad += batch.bad
        progress(number + 1)
    metrics, counts = sums.reduce(lambda flat: sum_over_dp(mesh, flat))
    usable = int(counts["usable"])
    if usable < loader.num_samples:
        bad_samples.record(step, gather_bad(bad, data, mesh))
    return Evaluation(task.results(metrics, float(counts["units"])), usable, loader.num_samples - usable)


class _Sums:
    """Named tensors, added up in float64 batch by batch."""

    def __init__(self) -> None:
        self._totals: tuple[dict[str, Tensor], ...] = ()

    def add(self, *groups: dict[str, Tensor]) -> None:
        found = tuple({name: value.double() for name, value in group.items()} for group in groups)
        if self._totals:
            for total, group in zip(self._totals, found, strict=True):
                for name in total:
                    total[name] += group[name]
        else:
            self._totals = found

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The sums over all ranks, on the CPU: one all-reduce."""
        tensors = [value for group in self._totals for value in group.values()]
        flat = sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in tensors])).cpu()
        pieces = iter(flat.split([tensor.numel() for tensor in tensors]))
        return tuple(
            {name: next(pieces).view(value.shape) for name, value in group.items()} for group in self._totals
        )
