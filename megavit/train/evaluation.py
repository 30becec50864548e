"""Top-1 on the validation shards while training."""

from __future__ import annotations

import torch

from megavit.data.bad import BadSamples
from megavit.data.device import to_model_input
from megavit.data.loader import EvalLoader
from megavit.parallel.collectives import sum_over_dp
from megavit.train.engine import Engine
from megavit.train.inputs import collect_bad, whole_batch
from megavit.train.watchdog import Watchdog


def evaluate(
    engine: Engine, loader: EvalLoader, bad_samples: BadSamples, step: int, watchdog: Watchdog
) -> tuple[float, int]:
    """(top-1, samples used) over the whole validation set, exact at any number of ranks: no sample dropped or
    counted twice. A prediction is right if it is one of the image's labels. Bad samples are recorded and left
    out."""
    run, mesh = engine.run, engine.mesh
    counts = torch.zeros(2, device=mesh.device, dtype=torch.float64)  # right, used
    bad = []
    for number, batch in enumerate(loader):
        watchdog.at(f"evaluating batch {number} after step {step}")
        images, labels, weights = whole_batch(batch, run, mesh)
        predicted = engine.predict(to_model_input(images, mesh.device)).argmax(1)
        right = (labels == predicted[:, None]).any(1)
        counts += torch.stack([(right * weights).sum(), weights.sum()])
        bad.append(batch._replace(images=batch.images[:0]))
    right_count, used = sum_over_dp(mesh, counts).tolist()
    if used < loader.num_samples:
        bad_samples.record(step, collect_bad(bad, run, mesh))
    return right_count / max(used, 1), int(used)
