"""Results as TensorBoard's scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megavit.evaluate.groups import best_known, grouped, short_names, tell_apart
from megavit.evaluate.results import Result


def scalars(results: Sequence[Result]) -> dict[str, float]:
    """Values by tag, `evaluate/<task>/<metric>`; model, set and settings follow where several results would
    have one tag. Those that are not finite are left out."""
    found: dict[str, float] = {}
    for (task, metric), group in grouped(results, lambda result: (result.task, result.metric)).items():
        by_place = grouped(group, lambda result: (result.model, result.data))
        places = [name if len(by_place) > 1 else "" for name in short_names(list(by_place))]
        for place, alike in zip(places, by_place.values(), strict=True):
            pairs = zip(tell_apart(alike), alike, strict=True)
            for settings, same in grouped(pairs, lambda pair: pair[0]).items():
                value = best_known([result for _, result in same]).value
                tag = "/".join(filter(None, ("evaluate", task, metric, place, settings)))
                if math.isfinite(value):
                    found[tag.replace(", ", "_").replace(" ", "_")] = value
    return found


def write_scalars(results: Sequence[Result], out: Path, step: int = 0) -> None:
    """Write the results into `out`/tensorboard, as of training step `step`."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=step) as board:
        for tag, value in scalars(results).items():
            board.add_scalar(tag, value, step)
