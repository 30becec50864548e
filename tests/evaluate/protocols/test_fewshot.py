"""Few-shot ridge regression against scikit-learn's."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from megavit.evaluate.protocols.fewshot import choose_shots, fewshot, fit_ridge
from megavit.evaluate.protocols.rows import Share, single_labels
from tests.evaluate.protocols.memory import arrays, digits, features, image_set


def ridge(x: np.ndarray, y: np.ndarray, queries: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """What scikit-learn predicts, float64 [m, K], with big_vision's whitening and constant column."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, queries = (np.pad((a - mean) / std, ((0, 0), (0, 1)), constant_values=100) for a in (x, queries))
    targets = 2.0 * (y[:, None] == classes) - 1
    return Ridge(alpha=1024, fit_intercept=False, solver="svd").fit(x, targets).predict(queries)


@pytest.mark.parametrize("shots", [1, 5, 6, 7, 25])
def test_equals_scikit_learn_ridge(shots: int) -> None:
    """Catches an unbiased std, a bias that is regularised otherwise, l2 scaled by n, and either of the two
    equations being wrong: 64 features and a constant, 10 to 60 images against 70 and 250."""
    train, test = digits()
    (x, y), (queries, _) = arrays(train), arrays(test)
    rows = choose_shots(train, shots, seed=3)
    probe = fit_ridge(Share(train, rows), y, rows, 1024.0)
    # Columns that are constant among the chosen images amplify rounding by 1e5: both leave them out.
    varied = x[rows].std(0) > 0
    expected = ridge(x[rows][:, varied], y[rows], queries[:, varied], np.arange(10))
    assert not probe.weight[:, ~torch.from_numpy(varied)].any()
    np.testing.assert_allclose(probe(torch.from_numpy(queries)), expected, atol=1e-6)


def test_measures_the_mean_over_seeds() -> None:
    """Catches the best seed in place of the mean, another choice of images than numpy's permutation of each
    class, a standard error over images, and a number of shots that uses another's head."""
    train, test = digits(train=400)
    (x, y), (queries, truth) = arrays(train), arrays(test)
    results = list(fewshot(train, [test], shots=(2, 10), seeds=(0, 1, 2, 3)))
    for measured, shots in zip(results, (2, 10), strict=True):
        each = []
        for seed in range(4):
            random = np.random.default_rng(seed)
            rows = np.concatenate([random.permutation(np.flatnonzero(y == c))[:shots] for c in range(10)])
            each.append((ridge(x[rows], y[rows], queries, np.arange(10)).argmax(1) == truth).mean())
        assert measured.settings["by_seed"] == pytest.approx(each, abs=1e-9)
        assert measured.value == pytest.approx(statistics.fmean(each))
        assert measured.stderr == pytest.approx(np.std(each, ddof=1) / 2)
        assert (measured.settings["shots"], measured.settings["images"]) == (shots, 10 * shots)


def test_small_and_absent_classes() -> None:
    """Catches a class with few images that is left out or drawn twice, one without any that is predicted,
    bad images among the chosen, and results that do not say so."""
    random = np.random.default_rng(0)
    labels = [0] * 8 + [2] * 3 + [3] * 8
    values = random.standard_normal((19, 6)) + 5 * np.eye(4, 6)[labels]
    train = features(image_set(labels), values, bad=[0, 9])
    rows = choose_shots(train, 5, seed=0)
    assert np.bincount(np.array(labels)[rows]).tolist() == [5, 0, 2, 5] and not {0, 9} & set(rows)
    assert set(choose_shots(train, 1, seed=0)) < set(rows)
    probe = fit_ridge(Share(train), single_labels(train), rows, 1024.0)
    assert set(probe(torch.randn(500, 6) * 100).argmax(1).tolist()) == {0, 2, 3}
    (found,) = fewshot(train, [train], shots=(5,), seeds=(0,))
    assert (found.settings["images"], found.settings["classes_with_fewer"], found.stderr) == (12, 1, None)


def test_features_that_are_not_finite_are_refused() -> None:
    """Catches NaN accuracies that look like chance."""
    values = np.ones((4, 3))
    values[2, 1] = np.nan
    train = features(image_set([0, 1, 2, 3]), values)
    with pytest.raises(ValueError, match="pooled are not finite"):
        list(fewshot(train, [train], shots=(1,)))
