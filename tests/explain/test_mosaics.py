"""Maps of a model that has learned something, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megavit import MegaVit
from megavit.explain.faithfulness import RANDOM
from megavit.explain.methods import compute_maps
from tests.explain.mosaics import SHAPE, Digits, all_maps, examples, scores, train


def test_a_mosaic_shows_the_digits_that_it_names() -> None:
    """Catches labels of another quadrant, and digits that are trained on among the unseen."""
    seen, unseen = (Digits(unseen=unseen).mosaics(300, np.random.default_rng(0)) for unseen in (False, True))
    assert all(len(set(row)) == 4 for row in seen.digits.tolist())
    tiles = [mosaics.images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 64) for mosaics in (seen, unseen)]
    nearest = torch.cdist(tiles[1], tiles[0]).min(1)
    assert nearest.values.min() > 0
    right = seen.digits.flatten()[nearest.indices] == unseen.digits.flatten()
    assert right.float().mean() > 0.9


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Mean over images of Spearman's."""
    pairs = zip(*(values.flatten(1).argsort(1).argsort(1).float() for values in (a, b)), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


@pytest.mark.slow
def test_maps_find_the_digit_and_what_the_model_uses() -> None:
    """Catches maps that look well and are wrong: no better than random, than the plain gradient, or than
    those of random weights; and a test that whatever looks at ink would pass, as raw attention does."""
    model = train(seed=0, steps=1000, batch=32, lr=3e-3, depth=2)
    given = examples(model, 100)
    maps = all_maps(model, given)
    found = {name: scores(model, given, values) for name, values in maps.items()}
    assert len(given.images) > 50
    assert found["located"].grid_pointing > 0.6 and found["located"].pointing > 0.8
    assert found["frozen"].grid_pointing > 0.45 and found["frozen"].pointing > 0.6
    assert found["frozen"].between > 0.65 and found["frozen"].saco > 0.7
    assert found["frozen"].between > found["gradient"].between + 0.3
    assert found["relevance"].pointing > 0.65 and found["relevance"].between > 0.4
    assert found["occlusion_3x3"].pointing > 0.85
    assert found["raw_attention"].pointing < 0.45 and found["rollout"].pointing < 0.45
    assert abs(found[RANDOM].between) < 0.1 and abs(found[RANDOM].saco) < 0.15

    fresh = MegaVit(**(SHAPE | {"depth": 2}), seed=50).eval()
    torch.nn.init.normal_(fresh.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    random = compute_maps(fresh, given.images, given.target, ["located", "frozen"])
    for name, values in random.items():
        assert abs(rank_correlation(values, maps[name])) < 0.3, name
