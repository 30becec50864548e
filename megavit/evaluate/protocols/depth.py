"""Errors of depth at the size of the truth: of each picture over its pixels, then the mean over pictures.

Letters: n pictures, M metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megavit.evaluate.dense import DensePass
from megavit.evaluate.protocols.standard_error import of_mean
from megavit.evaluate.results import Count, Measurement
from megavit.parallel.collectives import sum_over_dp
from megavit.tasks.depth import known_depth
from megavit.tasks.metrics import Align, Crop, crop_mask, depth_metric_names, depth_metrics

_HIGHER = "delta"  # starts the names of those that should be high


def depth_errors(
    maps: DensePass,
    *,
    limits: tuple[float, float],
    crop: Crop,
    align: Align,
    settings: Mapping[str, Any],
) -> Iterator[Measurement]:
    """Each metric of `depth_metrics`, over the pixels inside the crop whose true depth lies in `limits`, of
    the pictures that have any. Collective; the same numbers at any number of ranks."""
    names, mesh, given = depth_metric_names(), maps.mesh, len(maps.images)
    rows = torch.zeros(given, len(names), dtype=torch.float64, device=mesh.device)  # [n, M]
    for row, predicted, truth in maps.pairs():
        inside = crop_mask(crop, truth.shape[0], truth.shape[1], truth.device)
        valid = known_depth(truth, limits) & inside
        found = depth_metrics(predicted[None], truth[None], valid[None], limits=limits, align=align)
        rows[row] = torch.stack([found[name] for name in names])
    rows = sum_over_dp(mesh, rows).cpu()
    used = rows[rows[:, names.index("images")] > 0]
    count = Count(given, len(used), len(maps.bad))
    if not len(used):
        raise ValueError(
            f"none of the {given} pictures has a pixel of known depth between {limits[0]:g} and "
            f"{limits[1]:g} m inside the crop {crop}"
        )
    chosen = {"crop": crop, "align": align, "min_m": limits[0], "max_m": limits[1], **settings}
    for name, values in zip(names, used.numpy().T, strict=True):
        if name != "images":
            higher = name.startswith(_HIGHER)
            yield Measurement(name, float(values.mean()), count, of_mean(values), higher, chosen)
