"""Classes of pixels at the size of the truth: the mean IoU of one confusion matrix over all pictures.

Letters: n pictures, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.dense import DensePass
from megavit.evaluate.protocols.standard_error import bootstrap
from megavit.evaluate.results import Count, Measurement
from megavit.parallel.collectives import sum_over_dp
from megavit.tasks.metrics import class_counts, confusion, counted_iou, counted_results


def segmentation_scores(
    maps: DensePass,
    *,
    class_of: Tensor,
    class_names: Sequence[str],
    settings: Mapping[str, Any],
    seed: int = 0,
) -> Iterator[Measurement]:
    """miou (with the IoU of each class in its settings), pixel_accuracy and class_accuracy over all pixels
    that have a class; standard errors by drawing the pictures anew.

    `class_of`, int64 [K], is the set's number of each of the model's classes. Collective; the same numbers at
    any number of ranks. Memory: 12 K bytes a picture.
    """
    classes, mesh, given = len(class_names), maps.mesh, len(maps.images)
    counts = torch.zeros(given, 3, classes, dtype=torch.int32, device=mesh.device)
    class_of = class_of.to(mesh.device)
    for row, predicted, truth in maps.pairs():
        counts[row] = class_counts(confusion(class_of[predicted.long()], truth, classes)).int()
    counts = sum_over_dp(mesh, counts).cpu()
    used = counts[counts[:, 1].sum(1, dtype=torch.int64) > 0].long()
    if not len(used):
        raise ValueError(f"none of the {given} pictures could be used")
    found = counted_results(used.sum(0))
    iou = counted_iou(used.sum(0)).tolist()
    each = used.flatten(1).double().numpy()  # [n, 3K]

    def drawn(weights: np.ndarray) -> np.ndarray:
        sums = torch.from_numpy(weights @ each).view(3, classes)
        return np.array(list(counted_results(sums).values()))

    errors = bootstrap(drawn, len(used), seed=seed) if len(used) > 1 else [None] * len(found)
    count = Count(given, len(used), len(maps.bad))
    for (name, value), error in zip(found.items(), errors, strict=True):
        more = {"class_iou": dict(zip(class_names, iou, strict=True))} if name == "miou" else {}
        stderr = None if error is None else float(error)
        yield Measurement(name, value, count, stderr, settings={**settings, **more})
