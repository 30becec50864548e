"""Whether a map is right: what the probability does when patches go, or come, in the map's order; for
mosaics, whether the map finds the cell.

Letters: B images, N patches of an image, h rows and w columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megavit.explain.target import BLACK, Baseline, Target, check, replace
from megavit.model.vit import MegaVit
from megavit.tasks.config import Loss

RANDOM, BEST_RANDOM, CENTRED = "random", "best of the random maps", "centred Gaussian"


class Faithfulness(NamedTuple):
    """Of the maps of B images, float32 [B] each.

    `insertion`: area under the target's probability as patches join the baseline, the map's highest first;
    `deletion`: as they leave the image; `saco`: see `saco`.
    """

    insertion: Tensor
    deletion: Tensor
    saco: Tensor

    @property
    def between(self) -> Tensor:
        """Insertion less deletion; about 0 for a random order."""
        return self.insertion - self.deletion


def faithfulness(
    model: MegaVit,
    images: Tensor,
    target: Target,
    values: Tensor,
    *,
    loss: Loss = "sigmoid",
    baseline: Baseline = BLACK,
    steps: int = 16,
    groups: int = 10,
) -> Faithfulness:
    """How faithful the maps `values` [B, h, w] are to the model. Costs 2 (steps + 1) + groups + 1 forward
    passes of the B images. `loss` is the one that the model was trained with."""
    inserted, deleted = (
        probabilities(model, images, target, values, is_inserted, loss=loss, baseline=baseline, steps=steps)
        for is_inserted in (True, False)
    )
    return Faithfulness(
        _area(inserted), _area(deleted), saco(model, images, target, values, loss=loss, groups=groups)
    )


def with_controls(
    model: MegaVit,
    images: Tensor,
    target: Target,
    maps: Mapping[str, Tensor],
    *,
    loss: Loss = "sigmoid",
    baseline: Baseline = BLACK,
    steps: int = 16,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, Faithfulness]:
    """`faithfulness` of each of the `maps`, and beside them of what has not seen the model: the mean of
    `draws` random maps, the one of them that does best for its image, by insertion less deletion, and a
    Gaussian in the middle of the image, where photographers put things."""

    def judged(values: Tensor) -> Faithfulness:
        values = values.to(images.device)
        return faithfulness(model, images, target, values, loss=loss, baseline=baseline, steps=steps)

    shape = (len(images), *model.embed.grid(images))
    drawn = [judged(random_map(shape, seed + draw)) for draw in range(draws)]
    found = {name: judged(values) for name, values in maps.items()}
    columns = [torch.stack(of_each) for of_each in zip(*drawn, strict=True)]  # [draws, B] each
    best = Faithfulness(*columns).between.argmax(0, keepdim=True)
    found[RANDOM] = Faithfulness(*(column.mean(0) for column in columns))
    found[BEST_RANDOM] = Faithfulness(*(column.gather(0, best)[0] for column in columns))
    found[CENTRED] = judged(centred_gaussian(shape))
    return found


@torch.no_grad()
def probabilities(
    model: MegaVit,
    images: Tensor,
    target: Target,
    values: Tensor,
    is_inserted: bool,
    *,
    loss: Loss = "sigmoid",
    baseline: Baseline = BLACK,
    steps: int = 16,
) -> Tensor:
    """The target's probability, float32 [B, steps + 1], as equal shares of the patches, in the map's order,
    join the baseline (`is_inserted`) or leave the image for it. There are at most N steps."""
    images = check(model, images)
    places = _places(values)  # [B, h, w]
    count = places[0].numel() if len(places) else 1
    steps = min(steps, count)
    curve = []
    for step in range(steps + 1):
        is_first = places < round(step * count / steps)
        gone = ~is_first if is_inserted else is_first
        curve.append(target.probability(model(replace(model, images, gone, baseline)), loss))
    return torch.stack(curve, 1)


@torch.no_grad()
def saco(
    model: MegaVit,
    images: Tensor,
    target: Target,
    values: Tensor,
    *,
    loss: Loss = "sigmoid",
    groups: int = 10,
) -> Tensor:
    """The salience-guided faithfulness coefficient, float32 [B] in [-1, 1] (arXiv 2404.01415): whether of two
    groups of patches the one that the map ranks higher also matters more.

    The patches are put into `groups` of equal size in the map's order; what a group matters is the
    probability's fall when the image's mean colour replaces it. Each pair counts with the difference of the
    groups' mean values, for or against the map. 0 for a map that is the same everywhere.
    """
    images = check(model, images)
    places = _places(values)
    count = places[0].numel() if len(places) else 1
    groups = min(groups, count)
    mean_colour = images.mean((2, 3), keepdim=True)
    whole = target.probability(model(images), loss)
    salience, effect = [], []
    for group in range(groups):
        first, end = (round(number * count / groups) for number in (group, group + 1))
        members = (places >= first) & (places < end)
        salience.append((values * members).sum((1, 2)) / (end - first))
        effect.append(whole - target.probability(model(replace(model, images, members, mean_colour)), loss))
    weights = torch.stack(salience, 1)[:, :, None] - torch.stack(salience, 1)[:, None]  # [B, groups, groups]
    falls = torch.stack(effect, 1)[:, :, None] - torch.stack(effect, 1)[:, None]
    weights = weights.triu(1)  # the group that ranks higher comes first
    signs = torch.where(falls >= 0, 1.0, -1.0)
    total = weights.abs().sum((1, 2))
    return (signs * weights).sum((1, 2)) / total.clamp(min=torch.finfo(total.dtype).tiny)


def grid_pointing(values: Tensor, cell: Tensor) -> Tensor:
    """GridPG (arXiv 2104.00032): the share of the maps' positive values [B, h, w] that lies inside the cell,
    bool [B, h, w]; 0 where there are none. float32 [B]."""
    positive = values.clamp(min=0)
    total = positive.sum((1, 2))
    return (positive * cell).sum((1, 2)) / total.clamp(min=torch.finfo(total.dtype).tiny)


def pointing(values: Tensor, cell: Tensor) -> Tensor:
    """The pointing game: whether the highest of the values [B, h, w] is inside the cell, bool [B, h, w]."""
    return cell.flatten(1).gather(1, values.flatten(1).argmax(1, keepdim=True))[:, 0]


def random_map(shape: tuple[int, int, int], seed: int) -> Tensor:
    """[B, h, w], another one for each image."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def centred_gaussian(shape: tuple[int, int, int]) -> Tensor:
    """[B, h, w] around the middle of the image, of a quarter of its side as standard deviation."""
    count, rows, columns = shape
    down, right = ((torch.arange(n) + 0.5) / n * 4 - 2 for n in (rows, columns))
    return torch.exp(-(down[:, None].square() + right.square()) / 2).expand(count, rows, columns)


def _places(values: Tensor) -> Tensor:
    """Each patch's place in the map's order, 0 the highest, int64 [B, h, w]; equals in the order of rows."""
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1).view(values.shape)


def _area(curve: Tensor) -> Tensor:
    """Under [B, steps + 1] over a way of length 1."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))
