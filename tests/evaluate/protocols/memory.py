"""Small feature sets for tests, shared out over the ranks as unevenly as can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from megavit.evaluate.features import Features, MemoryFeatures, Piece
from megavit.evaluate.protocols.ranking import require_same_classes, score, tops
from megavit.evaluate.protocols.sgd import RATES, Batch, choose, train_heads
from megavit.evaluate.results import Measurement
from megavit.evaluate.sets.image_set import ImageSet, Pixels, label_lists
from megavit.parallel.mesh import Mesh


def image_set(labels: Sequence[Any], num_classes: int = 10, **changes: Any) -> ImageSet:
    """A set of tiny images. A label is a class id, or a list of them."""
    lists = [[label] if np.ndim(label) == 0 else list(label) for label in labels]
    pixels = Pixels("tiny", np.zeros((len(lists), 1, 1), np.uint8))
    names = tuple(f"class {i}" for i in range(num_classes))
    given = {"name": "tiny", "split": "train", "space": "tiny", "digest": "0"} | changes
    return ImageSet(images=pixels, labels=label_lists(lists), class_names=names, **given)


def features(
    images: ImageSet,
    values: np.ndarray,
    mesh: Mesh | None = None,
    bad: Sequence[int] = (),
    layer: str = "pooled",
) -> MemoryFeatures:
    """The last data-parallel rank of several has no row, the others unequal numbers, in pieces of 1 to 50."""
    mesh = mesh or Mesh.single()
    is_bad = np.zeros(len(images), bool)
    is_bad[list(bad)] = True
    owner = np.arange(len(images)) ** 2 % 5 % max(1, mesh.dp_size - 1)
    mine = np.flatnonzero(~is_bad & (owner == mesh.dp_rank))
    cuts = np.cumsum(np.arange(1, 50))
    pieces = [
        Piece(rows, torch.from_numpy(values[rows].astype(np.float32)))
        for rows in np.split(mine, cuts[cuts < len(mine)])
    ]
    return MemoryFeatures(images, layer, values.shape[1], is_bad, mesh, pieces)


def digits(
    mesh: Mesh | None = None, train: int = 1437, test: int = 360
) -> tuple[MemoryFeatures, MemoryFeatures]:
    """The pixels of scikit-learn's digits: the first of the 1437 images that are for training, and of the
    360 that are for testing."""
    values, labels = load_digits(return_X_y=True)
    return (
        features(image_set(labels[:train]), values[:train], mesh),
        features(image_set(labels[1437 : 1437 + test], split="test"), values[1437 : 1437 + test], mesh),
    )


def arrays(given: MemoryFeatures) -> tuple[np.ndarray, np.ndarray]:
    """All features, float64, and the class of each image; of one rank."""
    rows = np.concatenate([piece.rows for piece in given.mine()])
    values = torch.cat([piece.values for piece in given.mine()]).double().numpy()
    return values[np.argsort(rows)], given.labels[:, 0]


def sgd(
    batches: Iterable[Batch],
    steps: int,
    batch: int,
    train: Mapping[str, Features],
    tests: Sequence[Mapping[str, Features]],
    held: np.ndarray,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> Iterator[Measurement]:
    """What `linear-sgd` does: train all heads, choose one, and score it on the test sets."""
    for test in tests:
        for layer in train:
            require_same_classes(train[layer], test[layer])
    first = next(iter(train.values()))
    dims = {layer: features.dim for layer, features in train.items()}
    num_classes = len(first.set.class_names)
    heads = train_heads(batches, first.mesh, dims, num_classes, steps, batch, rates, seed)
    layer, probe, settings = choose(heads, train, held, rates)
    for test in tests:
        yield from tops(
            train[layer], test[layer], score(test[layer], [probe])[:, 0], settings | {"steps": steps}
        )
