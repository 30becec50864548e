"""Top-1 on the validation shards while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megavit.data.bad import BadSample, BadSamples
from megavit.data.device import to_model_input
from megavit.data.loader import EvalLoader
from megavit.parallel.collectives import sum_over_dp
from megavit.train.engine import Engine
from megavit.train.inputs import gather_bad, whole_batch
from megavit.train.watchdog import Watchdog


class Evaluation(NamedTuple):
    """Top-1 over the images that have a label, how many those were, how many could be decoded but have no
    label, and how many were unusable."""

    top1: float
    num_labelled: int
    num_unlabelled: int
    num_bad: int


def evaluate(
    engine: Engine,
    loader: EvalLoader,
    bad_samples: BadSamples,
    step: int,
    watchdog: Watchdog,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Top-1 over the whole validation set, exact at any number of ranks: no sample dropped or counted twice.

    A prediction is right if it is one of the image's labels. Bad samples are recorded and left out; an image
    without any label is no part of top-1. `progress` is told the number of batches that are done.
    """
    data, mesh = engine.run.data, engine.mesh
    counts = torch.zeros(3, device=mesh.device, dtype=torch.float64)  # right, labelled, usable
    bad: list[BadSample] = []
    for number, batch in enumerate(loader):
        watchdog.at(f"evaluating batch {number} after step {step}")
        fields, weights = whole_batch(batch, data, mesh)
        labels = fields["label"]
        predicted = engine.predict(to_model_input(fields["image"], mesh.device)).argmax(1)
        right = (labels == predicted[:, None]).any(1)
        labelled = (labels >= 0).any(1)
        counts += torch.stack([(right * weights).sum(), (labelled * weights).sum(), weights.sum()])
        bad += batch.bad
        progress(number + 1)
    right_count, labelled_count, usable = sum_over_dp(mesh, counts).tolist()
    if usable < loader.num_samples:
        bad_samples.record(step, gather_bad(bad, data, mesh))
    num_labelled, num_unlabelled = int(labelled_count), int(usable - labelled_count)
    top1 = right_count / max(num_labelled, 1)
    return Evaluation(top1, num_labelled, num_unlabelled, loader.num_samples - int(usable))
