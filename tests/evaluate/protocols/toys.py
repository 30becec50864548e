"""Features in memory, shared out over the ranks unevenly, for the tests of protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megavit.evaluate.features import MemoryFeatures, Piece
from megavit.evaluate.sets.image_set import ImageSet, Pixels, label_lists
from megavit.parallel.mesh import Mesh


def features_of(
    values: np.ndarray,
    labels: Sequence[Sequence[int]] | np.ndarray,
    mesh: Mesh | None = None,
    *,
    bad: Sequence[int] = (),
    classes: int = 10,
    pieces: int = 2,
    **fields: Any,
) -> MemoryFeatures:
    """Features [n, D] of n images. With several ranks the last one has no rows, and no two have equally
    many."""
    mesh = mesh or Mesh.single()
    lists = labels if isinstance(labels, np.ndarray) else label_lists(labels)
    n = len(values)
    images = ImageSet(
        name="toy",
        split="test",
        images=Pixels("toy", np.zeros((n, 1, 1), np.uint8)),
        labels=lists.reshape(n, -1).astype(np.int64),
        class_names=tuple(f"class{number}" for number in range(classes)),
        space="toy",
        digest="",
        **fields,
    )
    missing = np.zeros(n, bool)
    missing[list(bad)] = True
    usable = np.flatnonzero(~missing)
    holders = max(1, mesh.dp_size - 1)
    bounds = len(usable) * np.arange(holders + 1) ** 2 // holders**2
    mine = usable[bounds[mesh.dp_rank] : bounds[mesh.dp_rank + 1]] if mesh.dp_rank < holders else usable[:0]
    parts = [
        Piece(rows, torch.from_numpy(values[rows].astype(np.float32)).to(mesh.device))
        for rows in np.array_split(mine, pieces)
        if len(rows)
    ]
    return MemoryFeatures(images, "pooled", values.shape[1], missing, mesh, parts)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))
