"""Where the truth is known: 2 x 2 mosaics of real handwritten digits, and models that name the digits in
them.

`python -m tests.explain.mosaics --seed 0 --pool map` trains one, on one thread, measures every method on
mosaics of digits that it has not seen, and prints a table.

Letters: n mosaics of 16 x 16 pixels, 8 x 8 patches; quadrants are numbered row by row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from megavit import MegaVit

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
