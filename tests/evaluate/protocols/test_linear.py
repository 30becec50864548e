"""Logistic regression against scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from megavit.evaluate.features import Piece
from megavit.evaluate.protocols import linear as linear_module
from megavit.evaluate.protocols.linear import C_VALUES, Effort, Regression, fit, linear
from megavit.evaluate.protocols.rows import held_out_tenth
from tests.evaluate.protocols.memory import arrays, digits, features, image_set


def objective(x: np.ndarray, y: np.ndarray, c: float, weight: np.ndarray, bias: np.ndarray) -> float:
    logits = x @ weight.T + bias
    high = logits.max(1)
    total = high + np.log(np.exp(logits - high[:, None]).sum(1))
    loss = (total - logits[np.arange(len(y)), y]).sum()
    return (loss + (weight**2).sum() / (2 * c)) / len(y)


@pytest.mark.parametrize("c", [1e-4, 0.01, 1.0])
def test_minimum_is_scikit_learns(c: float) -> None:
    """Catches C that multiplies another thing than the sum of losses, a regularised bias, a wrong gradient
    (of the bias through the mean, above all), and an end before the minimum."""
    train, test = digits()
    (x, y), (queries, _) = arrays(train), arrays(test)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    regression = Regression(train, np.arange(10), train.usable)
    found, converged = regression.minimize(c, torch.zeros(10, 65, dtype=torch.float64), Effort(1e-8, 5000))
    weight, bias = found[:, :-1].numpy(), found[:, -1].numpy()
    least = objective(x, y, c, theirs.coef_, theirs.intercept_)
    assert converged
    assert objective(x, y, c, weight, bias) == pytest.approx(least, rel=1e-5)
    assert regression.value_and_gradient(c, found)[0].item() == pytest.approx(
        objective(x, y, c, weight, bias), rel=1e-12
    )
    np.testing.assert_array_equal((queries @ weight.T + bias).argmax(1), theirs.predict(queries))


def test_gradient_is_that_of_the_value() -> None:
    """Catches a gradient that the optimizer survives with more steps."""
    train, _ = digits(train=100)
    regression = Regression(train, np.arange(10), train.usable)
    point = torch.randn(10, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 10
    _, gradient = regression.value_and_gradient(0.1, point)
    for row, column in ((0, 20), (3, 64), (9, 33)):
        step = torch.zeros_like(point)
        step[row, column] = 1e-5
        up, down = (regression.value_and_gradient(0.1, point + sign * step)[0] for sign in (1, -1))
        assert gradient[row, column].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5, abs=1e-8)


def test_sweep_on_digits_is_within_a_tenth_of_a_point() -> None:
    """Catches a sweep that ends far from the minimum at the chosen C, and settings of another fit than the
    one that was measured."""
    train, test = digits()
    (x, y), (queries, truth) = arrays(train), arrays(test)
    top1, top5 = linear(train, [test])
    theirs = LogisticRegression(C=top1.settings["C"], tol=1e-6, max_iter=10_000).fit(x, y)
    accuracy = theirs.score(queries, truth)
    assert abs(top1.value - accuracy) < 1e-3
    assert top1.stderr == pytest.approx(math.sqrt(top1.value * (1 - top1.value) / 360))
    assert (top1.settings["held_out_images"], top1.settings["converged"]) == (143, True)
    assert top1.settings["C"] in C_VALUES and len(C_VALUES) == 45
    assert top5.value > top1.value > 0.88


def test_choice_is_made_on_the_held_out_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a C that is chosen on what was fitted (the largest always wins there) or on the test set, a
    fit that sees the held-out rows, and a last fit that leaves them out."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 120)
    values = random.standard_normal((120, 30))
    values[np.arange(120), labels] += 1.0
    train = features(image_set(labels, 3), values)
    fitted = []
    minimize = Regression.minimize
    monkeypatch.setattr(
        Regression,
        "minimize",
        lambda self, c, *rest: fitted.append((c, self._count)) or minimize(self, c, *rest),
    )
    c_values = (1e-5, 1e-3, 1e-1, 10, 1e3)
    probe, settings = fit(train, c_values)
    kept, held = held_out_tenth(train)
    scores = []
    for c in c_values:
        model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(values[kept], labels[kept])
        likelihood = model.predict_log_proba(values[held])[np.arange(12), labels[held]].mean()
        scores.append((model.score(values[held], labels[held]), likelihood))
    assert settings["C"] == c_values[scores.index(max(scores))]
    assert settings["held_out_top1"] == pytest.approx(max(scores)[0])
    assert fitted == [*((c, 108) for c in c_values), (settings["C"], 120)]
    model = LogisticRegression(C=settings["C"], tol=1e-8, max_iter=5000).fit(values, labels)
    np.testing.assert_allclose(probe.weight, model.coef_, atol=1e-4)


def test_probe_covers_the_label_space() -> None:
    """Catches class ids that are places among those that occur, and a class that nothing was learnt of being
    predicted; logits that a score refuses because they are not finite."""
    random = np.random.default_rng(0)
    labels = np.repeat([1, 4, 7], 20)
    values = random.standard_normal((60, 5)) + labels[:, None]
    train = features(image_set(labels), values)
    probe, _ = fit(train, (0.1, 10))
    logits = probe(torch.from_numpy(values).float())
    assert logits.shape == (60, 10) and logits.isfinite().all()
    assert set(probe(torch.randn(500, 5) * 100).argmax(1).tolist()) == {1, 4, 7}
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9


def test_features_that_are_not_finite_are_refused() -> None:
    """Catches an optimizer that stops at once with NaN, and a probe of zeros as its result."""
    train, _ = digits(train=100)
    rows = np.arange(100)
    train._pieces = [Piece(rows, torch.full((100, 64), torch.inf))]
    with pytest.raises(ValueError, match="pooled are not finite"):
        fit(train)


def test_a_fit_that_runs_out_of_steps_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 'converged' that is always true."""
    monkeypatch.setattr(linear_module, "_FINAL", Effort(1e-9, 2))
    assert fit(digits(train=100)[0], (1.0,))[1]["converged"] is False
