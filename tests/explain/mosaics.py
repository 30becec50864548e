"""Where the truth is known: 2 x 2 mosaics of real handwritten digits, and models that name the digits in
them.

`python -m tests.explain.mosaics --seed 0 --pool map` trains one, on one thread, measures every method on
mosaics of digits that it has not seen, and prints a table.

Letters: n mosaics of 16 x 16 pixels, 8 x 8 patches; quadrants are numbered row by row.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from megavit import MegaVit
from megavit.explain.faithfulness import (
    CENTRED,
    RANDOM,
    centred_gaussian,
    faithfulness,
    grid_pointing,
    pointing,
    random_map,
)
from megavit.explain.gradient import frozen
from megavit.explain.methods import METHODS, compute_maps
from megavit.explain.relevance import smoothed
from megavit.explain.target import Target

SHAPE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "channels": 1,
    "num_classes": 10,
    "dim": 64,
    "depth": 4,
    "heads": 4,
    "mlp_dim": 256,
}
_NUM_TRAINED = 1437  # of 1797 digits


class Mosaics(NamedTuple):
    """`images` [n, 1, 16, 16] in [-1, 1]; `digits` int64 [n, 4], the different digits of the quadrants."""

    images: Tensor
    digits: Tensor


class Digits:
    """Mosaics of the digits that models are trained on, or of the others."""

    def __init__(self, *, unseen: bool):
        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))
        mine = order[_NUM_TRAINED:] if unseen else order[:_NUM_TRAINED]
        self._tiles = torch.tensor(found.images[mine] / 8 - 1, dtype=torch.float32)
        self._of = [np.flatnonzero(found.target[mine] == digit) for digit in range(10)]

    def mosaics(self, count: int, rng: np.random.Generator) -> Mosaics:
        digits = np.argsort(rng.random((count, 10)), axis=1)[:, :4]
        draws = rng.random((count, 4))
        rows = np.empty((count, 4), dtype=np.int64)
        for digit, tiles in enumerate(self._of):
            chosen = digits == digit
            rows[chosen] = tiles[(draws[chosen] * len(tiles)).astype(np.int64)]
        tiles = self._tiles[torch.from_numpy(rows)].view(count, 2, 2, 8, 8)
        images = tiles.permute(0, 1, 3, 2, 4).reshape(count, 1, 16, 16)
        return Mosaics(images, torch.from_numpy(digits))


def labels(digits: Tensor) -> Tensor:
    """[n, 10], one for each digit of the mosaic."""
    return torch.zeros(len(digits), 10).scatter_(1, digits, 1.0)


def train(seed: int, steps: int = 2000, batch: int = 64, lr: float = 2e-3, **fields: Any) -> MegaVit:
    """A model that says of each digit whether the mosaic has it, in evaluation mode."""
    model = MegaVit(**(SHAPE | fields), seed=seed)
    data, rng = Digits(unseen=False), np.random.default_rng(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], lr=lr
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        images, digits = data.mosaics(batch, rng)
        loss = F.binary_cross_entropy_with_logits(model(images), labels(digits))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: MegaVit, mosaics: Mosaics) -> float:
    """The share of the 10 answers a mosaic that are right."""
    return float(((model(mosaics.images) > 0) == labels(mosaics.digits).bool()).float().mean())


class Examples(NamedTuple):
    """Mosaics [n, ...] with one digit each that the model finds, and the cell of patches where it is."""

    images: Tensor
    target: Target
    cell: Tensor  # bool [n, 8, 8]


@torch.no_grad()
def examples(model: MegaVit, count: int, seed: int = 0) -> Examples:
    """From `count` mosaics of unseen digits, those in which the model finds the digit that is asked for."""
    rng = np.random.default_rng(seed)
    images, digits = Digits(unseen=True).mosaics(count, rng)
    quadrants = torch.from_numpy(rng.integers(0, 4, count))
    classes = digits.gather(1, quadrants[:, None])[:, 0]
    cells = F.one_hot(quadrants, 4).view(count, 2, 2).bool()
    cells = cells.repeat_interleave(4, 1).repeat_interleave(4, 2)
    found = model(images).gather(1, classes[:, None])[:, 0] > 0
    return Examples(images[found], Target(classes[found]), cells[found])


class Scores(NamedTuple):
    """Means over examples."""

    grid_pointing: float
    pointing: float
    deletion: float
    insertion: float
    between: float
    saco: float


def scores(model: MegaVit, given: Examples, values: Tensor) -> Scores:
    """Of the maps `values` [n, 8, 8], four patches of 64 a step."""
    found = faithfulness(model, given.images, given.target, values)
    parts = (
        grid_pointing(values, given.cell),
        pointing(values, given.cell).float(),
        found.deletion,
        found.insertion,
        found.between,
        found.saco,
    )
    return Scores(*(float(part.mean()) for part in parts))


def all_maps(model: MegaVit, given: Examples) -> dict[str, Tensor]:
    """Every method's maps, variants of some, and the controls."""
    images, target = given.images, given.target
    maps = compute_maps(model, images, target, list(METHODS))
    maps["frozen, 4 images on the way"] = frozen(model, images, target, steps=4)
    maps["frozen, smoothed 3x3"] = smoothed(maps["frozen"])
    shape = tuple(maps["frozen"].shape)
    return maps | {RANDOM: random_map(shape, 0), CENTRED: centred_gaussian(shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", choices=("map", "mean", "cls"), default="map")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mosaics", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(options.seed, options.steps, pool=options.pool, depth=options.depth)
    given = examples(model, options.mosaics)
    right = accuracy(model, Digits(unseen=True).mosaics(1000, np.random.default_rng(99)))
    print(f"label accuracy {right:.3f}, {len(given.images)} targets", flush=True)
    print("| method |", " | ".join(Scores._fields), "|")
    for name, values in all_maps(model, given).items():
        print(f"| {name} |", " | ".join(f"{value:.3f}" for value in scores(model, given, values)), "|")


if __name__ == "__main__":
    main()
