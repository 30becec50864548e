"""What says whether a map is right: identities that hold for every map and model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megavit.explain.faithfulness import (
    BEST_RANDOM,
    CENTRED,
    RANDOM,
    centred_gaussian,
    faithfulness,
    grid_pointing,
    pointing,
    probabilities,
    random_map,
    saco,
    with_controls,
)
from megavit.explain.target import Target, replace
from tests.explain.test_maps import GRID, photos
from tests.model.test_observe import build

CLASSES = Target(torch.tensor([1, 3]))


def map_of(seed: int = 0) -> Tensor:
    return random_map((2, *GRID), seed) - 0.5


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_curves_go_from_the_baseline_to_the_image_and_back(loss: str) -> None:
    """Catches patches covered in another order, in shares that do not add up (15 patches in 7 steps), and
    the probability of another loss."""
    model, images, values = build().eval(), photos(2), map_of()
    model.head.weight.data /= 10  # so that no probability is near 0 or 1
    with torch.no_grad():
        logits = torch.stack([model(torch.full_like(images, -1)), model(images)])
    every = logits.sigmoid() if loss == "sigmoid" else logits.softmax(-1)
    ends = every[:, [0, 1], CLASSES.classes]
    settings = {"loss": loss, "steps": 7}
    inserted = probabilities(model, images, CLASSES, values, True, **settings)
    deleted = probabilities(model, images, CLASSES, values, False, **settings)
    assert inserted.shape == (2, 8)
    torch.testing.assert_close(inserted[:, [0, -1]], ends.T)
    torch.testing.assert_close(deleted[:, [-1, 0]], ends.T)
    # Without the map's highest patches is with those that are highest when its sign is turned.
    turned = probabilities(model, images, CLASSES, -values, True, **settings).flip(1)
    torch.testing.assert_close(deleted, turned)
    assert (inserted - deleted.flip(1)).abs().max() > 1e-4

    order = values.flatten(1).argsort(1, descending=True)
    covered = torch.ones(2, 15, dtype=torch.bool).scatter(1, order[:, :4], False).view(2, *GRID)  # 30 / 7
    with torch.no_grad():
        logits = model(replace(model, images, covered, -1.0))
    torch.testing.assert_close(inserted[:, 2], CLASSES.probability(logits, loss))


def test_areas_are_means_of_the_curves() -> None:
    """Catches areas that are not those under the curve, or the two the wrong way round."""
    model = build().eval()
    found = faithfulness(model, photos(2), CLASSES, map_of(), steps=5)
    for area, is_inserted in ((found.insertion, True), (found.deletion, False)):
        curve = probabilities(model, photos(2), CLASSES, map_of(), is_inserted, steps=5)
        torch.testing.assert_close(area, ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1))
    torch.testing.assert_close(found.between, found.insertion - found.deletion)
    torch.testing.assert_close(found.saco, saco(model, photos(2), CLASSES, map_of()))


def test_saco_is_one_for_the_truth() -> None:
    """Catches signs and pairs the wrong way round: for a map that is, of each patch, what it matters."""
    model, images = build().eval(), photos(2)
    colour = images.mean((2, 3), keepdim=True)
    truth = torch.zeros(2, *GRID)
    with torch.no_grad():
        whole = CLASSES.probability(model(images), "sigmoid")
        for number in range(15):
            alone = torch.zeros(15, dtype=torch.bool)
            alone[number] = True
            covered = replace(model, images, alone.view(1, *GRID).expand(2, -1, -1), colour)
            fall = whole - CLASSES.probability(model(covered), "sigmoid")
            truth[:, number // 5, number % 5] = fall
    torch.testing.assert_close(saco(model, images, CLASSES, truth, groups=15), torch.ones(2))
    torch.testing.assert_close(saco(model, images, CLASSES, -truth, groups=15), -torch.ones(2))
    assert saco(model, images, CLASSES, torch.ones(2, *GRID), groups=15).abs().max() == 0
    assert saco(model, images, CLASSES, truth, groups=4).abs().max() <= 1
    # Two patches that change places: their pair, and those with what lies between, count against the map.
    low, high = truth[0].argmin(), truth[0].argmax()
    mixed = truth.clone()
    mixed[0].view(-1)[[int(low), int(high)]] = truth[0].view(-1)[[int(high), int(low)]]
    values, falls, total, signed = mixed[0].flatten(), truth[0].flatten(), 0.0, 0.0
    for i in range(15):
        for j in range(i):
            weight = abs(float(values[i] - values[j]))
            total += weight
            signed += weight if (values[i] > values[j]) == (falls[i] > falls[j]) else -weight
    found = saco(model, images, CLASSES, mixed, groups=15)
    assert float(found[0]) == pytest.approx(signed / total, abs=1e-4) and float(found[1]) == pytest.approx(1)


def test_cells_share_the_positive_values() -> None:
    """Catches evidence against the target that is counted, and an argmax of another image."""
    values = torch.tensor([[[3.0, -9.0], [1.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]])
    cell = torch.tensor([[[True, True], [False, False]], [[False, False], [True, False]]])
    assert grid_pointing(values, cell).tolist() == [0.75, 0.0]
    assert pointing(values, cell).tolist() == [True, False]
    assert pointing(-values, cell).tolist() == [True, False]


def test_controls_stand_beside_every_map() -> None:
    """Catches a random map that is one draw, or the same for all images, and a Gaussian off the middle."""
    model = build().eval()
    found = with_controls(model, photos(2), CLASSES, {"mine": map_of()}, steps=3, draws=2, seed=5)
    assert list(found) == ["mine", RANDOM, BEST_RANDOM, CENTRED]
    draws = [
        faithfulness(model, photos(2), CLASSES, random_map((2, *GRID), seed), steps=3) for seed in (5, 6)
    ]
    torch.testing.assert_close(found[RANDOM].insertion, (draws[0].insertion + draws[1].insertion) / 2)
    torch.testing.assert_close(found[RANDOM].saco, (draws[0].saco + draws[1].saco) / 2)
    best = torch.maximum(draws[0].between, draws[1].between)
    torch.testing.assert_close(found[BEST_RANDOM].between, best)
    both = random_map((2, *GRID), 5)
    assert not torch.equal(both[0], both[1])
    centred = centred_gaussian((1, 3, 5))[0]
    assert centred.argmax() == 7 and torch.allclose(centred, centred.flip(0, 1))
