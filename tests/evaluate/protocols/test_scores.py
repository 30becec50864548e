"""The numbers of every image, against plain loops over the whole matrix of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megavit.evaluate.protocols import scores as module
from megavit.evaluate.protocols.calibration import calibration
from megavit.evaluate.protocols.classify import classify
from megavit.evaluate.protocols.multi_label import mean_average_precision
from megavit.evaluate.protocols.ood import ood
from megavit.evaluate.protocols.scores import Scores, score
from megavit.evaluate.protocols.selective import selective
from megavit.evaluate.protocols.shape_bias import shape_bias
from megavit.evaluate.results import Count, Measurement
from megavit.parallel.mesh import Mesh
from tests.evaluate.protocols.toys import features_of, sigmoid, softmax
from tests.ranks import run_ranks

NUMBERS = ("max_logit", "logsumexp", "confidence", "entropy", "top1", "top5", "nll", "brier")


def of_one_image(z: np.ndarray, labels: list[int], link: str) -> dict[str, float]:
    """Every number of one image by its definition."""
    p = softmax(z) if link == "softmax" else sigmoid(z)
    order = np.argsort(-z)
    out = {"max_logit": z.max(), "logsumexp": np.log(np.exp(z).sum()), "confidence": p[order[0]]}
    if link == "softmax":
        out["entropy"] = -sum(q * np.log(q) for q in p)
    else:
        out["entropy"] = -sum(q * np.log(q) + (1 - q) * np.log(1 - q) for q in p)
    label = max(labels, key=lambda c: z[c])
    target = np.eye(len(z))[label]
    out["top1"] = float(order[0] in labels)
    out["top5"] = float(bool(set(order[:5]) & set(labels)))
    if link == "softmax":
        out["nll"] = -np.log(p[label])
    else:
        out["nll"] = -sum(np.log(q) if t else np.log(1 - q) for q, t in zip(p, target, strict=True))
    out["brier"] = ((p - target) ** 2).sum()
    return out


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_numbers_of_every_image(link: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a number by another definition, labels beyond the first ignored, a bad or an unlabelled image
    that counts, rows that land at another image's place, and small pieces that lose rows."""
    monkeypatch.setattr(module, "_ELEMENTS", 30)  # 3 rows at once
    random = np.random.default_rng(0)
    z = (random.normal(size=(23, 10)) * 3).astype(np.float32).astype(float)
    labels = [[int(c) for c in random.choice(10, 1 + i % 3, replace=False)] for i in range(23)]
    labels[4] = []
    found = score(features_of(z, labels, bad=[7, 20], right="any"), lambda values: values, link)
    assert found.count == Count(23, 20, 2) and found.classes == 10
    assert np.flatnonzero(~found.scored).tolist() == [4, 7, 20]
    for row in np.flatnonzero(found.scored):
        expected = of_one_image(z[row], labels[row], link)
        assert found.predicted[row] == z[row].argmax()
        for name in NUMBERS:
            assert getattr(found, name)[row] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), (row, name)
    assert np.isnan(found.nll[[4, 7]]).all() and np.isnan(found.confidence[7]) and found.predicted[7] == -1
    assert found.confidence[4] == pytest.approx((softmax if link == "softmax" else sigmoid)(z[4]).max())


def test_only_candidates_are_predicted() -> None:
    """Catches the 200 classes of a subset scored among all 1,000, the failure that gives 0.08% on ImageNet-A:
    the highest logit is outside of the candidates everywhere here."""
    z = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32).astype(float)
    z[:, 0] = 9
    candidates = np.array([13, 3, 5, 17, 2, 8, 11])
    labels = candidates[np.arange(12) % 7]
    features = features_of(z, labels, classes=20, candidates=candidates)
    found = score(features, lambda values: values, "softmax")
    inner = z[:, candidates]
    assert found.classes == 7
    assert found.predicted.tolist() == candidates[inner.argmax(1)].tolist()
    assert found.top1.tolist() == (candidates[inner.argmax(1)] == labels).tolist()
    expected = -np.log(softmax(inner)[np.arange(12), np.arange(12) % 7])
    np.testing.assert_allclose(found.nll, expected, atol=1e-9)
    unlabelled = score(features, lambda values: values, "softmax", labelled=False)
    assert (unlabelled.predicted == 0).all() and unlabelled.classes == 20 and unlabelled.count.used == 12


def test_a_collapsed_model_is_not_right() -> None:
    """Catches top-5 counted by 'no more than four logits are higher', by which equal logits are always
    right."""
    labels = np.arange(40) % 20
    found = score(features_of(np.zeros((40, 20)), labels, classes=20), lambda values: values, "softmax")
    assert found.top1.mean() == 1 / 20 and found.top5.mean() == 5 / 20


def test_what_cannot_be_scored_is_said() -> None:
    """Catches class ids beyond the outputs, labels outside the candidates and NaN logits that become
    numbers."""
    z = np.zeros((4, 3))
    with pytest.raises(ValueError, match="class ids up to 3, but the classifier has only 3 outputs"):
        score(features_of(z, np.array([0, 1, 2, 3])), lambda values: values, "softmax")
    with pytest.raises(
        ValueError, match=r"2 of 4 images have only labels outside its 2 candidates.*toy\[1\]"
    ):
        features = features_of(z, np.array([0, 1, 2, 1]), candidates=np.array([0, 2]))
        score(features, lambda values: values, "softmax")
    z[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 4 images are not finite, e.g. of toy\[2\]"):
        score(features_of(z, np.array([0, 1, 2, 1])), lambda values: values, "softmax")


def everything(tp_size: int) -> list[Measurement]:
    """All protocols of this folder on this rank's share of one problem."""
    mesh = Mesh.from_environment(tp_size)
    random = np.random.default_rng(3)
    head = torch.from_numpy(random.normal(size=(6, 9)).astype(np.float32))
    centres = random.normal(size=(9, 6)) * 2
    labels = np.arange(61) % 9
    x = centres[labels] + random.normal(size=(61, 6))
    train = features_of(x, labels, mesh, bad=[5], classes=9)
    test = features_of(x[:37] + random.normal(size=(37, 6)), labels[:37], mesh, bad=[0, 36], classes=9)
    other = features_of(random.normal(size=(23, 6)) * 3, np.zeros(23, int), mesh, bad=[2], classes=9)
    lists = [[int(c) for c in random.choice(9, i % 4, replace=False)] for i in range(37)]
    many = features_of(x[:37], lists, mesh, bad=[1], classes=9, right="all")
    cues = {"shape": labels[:37] % 3, "texture": labels[1:38] % 3}
    conflict = features_of(x[:37], cues["shape"], mesh, bad=[9], classes=3, groups=cues)
    categories = {f"class{c}": [c, c + 3, c + 6] for c in range(3)}

    def logits_of(values: torch.Tensor) -> torch.Tensor:
        return values @ head

    found: Scores = score(test, logits_of, "softmax")
    return [
        *classify(found, chance_is_error=False),
        *calibration(test, logits_of, found, kept_bytes=0),
        *selective(found),
        *ood(test, other, train=train, logits_of=logits_of, k=5),
        *mean_average_precision(many, logits_of, "sigmoid"),
        *shape_bias(conflict, logits_of, categories),
    ]


@pytest.mark.dist
def test_the_same_at_any_number_of_ranks() -> None:
    """Catches rows counted twice or lost, sums over the wrong ranks, a rank without rows that hangs or
    divides by zero, and numbers that depend on how the rows are shared out."""
    alone = run_ranks(1, everything, 1)[0]
    assert len(alone) == 2 + 6 + 6 + 18 + 1 + 3
    for count, tp_size in ((2, 1), (3, 1), (4, 1), (4, 2)):
        for rank in run_ranks(count, everything, tp_size):
            for one, many in zip(alone, rank, strict=True):
                assert (one.metric, one.count) == (many.metric, many.count)
                assert many.value == pytest.approx(one.value, abs=1e-5), one.metric
                assert many.stderr == pytest.approx(one.stderr, abs=1e-4), one.metric
