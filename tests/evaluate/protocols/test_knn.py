"""kNN against scikit-learn's neighbours and a vote in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from megavit.evaluate.protocols import rows as rows_module
from megavit.evaluate.protocols.knn import knn, nearest
from megavit.evaluate.protocols.rows import Share
from tests.evaluate.protocols.memory import arrays, digits, features, image_set

KS = (1, 10, 20, 100, 200)


def test_neighbours_and_votes_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong metric, neighbours lost between chunks, a temperature that is multiplied, and a vote
    over all of max(ks) for each k."""
    monkeypatch.setattr(rows_module, "_CHUNK_NUMBERS", 500_000)  # some 200 rows at a time
    train, test = digits()
    (x, y), (queries, truth) = arrays(train), arrays(test)
    found = NearestNeighbors(n_neighbors=200, metric="cosine").fit(x)
    distances, expected = found.kneighbors(queries)
    similarities, rows = nearest(train, torch.from_numpy(queries), 200)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-8)
    for k in KS:
        np.testing.assert_array_equal(np.sort(rows[:, :k], 1), np.sort(expected[:, :k], 1))
    measured = {(m.metric, m.settings["k"]): m for m in knn(train, [test], KS)}
    for k in KS:
        weights = np.exp((1 - distances[:, :k]) / 0.07)
        votes = np.stack([(weights * (y[expected[:, :k]] == c)).sum(1) for c in range(10)], 1)
        top1 = (votes.argmax(1) == truth).mean()
        assert measured["top1", k].value == pytest.approx(top1, abs=1e-9)
        five = np.argsort(-votes, 1, kind="stable")[:, :5]
        in_five = ((five == truth[:, None]) & (np.take_along_axis(votes, five, 1) > 0)).any(1)
        assert measured["top5", k].value == pytest.approx(in_five.mean(), abs=1e-9)
        assert measured["top1", k].stderr == pytest.approx(math.sqrt(top1 * (1 - top1) / 360))
        assert measured["top1", k].count == (360, 360, 0)


def test_equal_similarities_are_in_the_order_of_the_rows() -> None:
    """Catches ties that fall as the sort, the chunks or the summation happen to put them: copies of an image,
    at other lengths too, and right angles."""
    random = np.random.default_rng(1)
    one = random.standard_normal(50)
    x = np.zeros((60, 51))
    x[:, 50] = 1  # at a right angle to the query
    x[5::6, :50], x[5::6, 50] = one * random.uniform(0.1, 9, (10, 1)), 0
    similarities, rows = nearest(features(image_set([0] * 60), x), torch.tensor(np.append(one, 0))[None], 13)
    assert rows[0].tolist() == [*range(5, 60, 6), 0, 1, 2]
    assert similarities[0].tolist() == pytest.approx([1] * 10 + [0] * 3, abs=1e-7)


def test_fewer_training_images_than_k() -> None:
    """Catches a crash, or a k in the results that nobody had, with small sets; bad images that vote."""
    values = np.eye(8)
    train = features(image_set([0, 1, 2, 3, 4, 5, 6, 7]), values, bad=[0, 4])
    (first, *_) = list(knn(train, [train], ks=(200,)))
    assert (first.settings["k"], first.settings["neighbors"]) == (200, 6)
    assert first.value == 1.0 and first.count == (8, 6, 2)
    similarities, rows = nearest(Share(train), torch.from_numpy(values[:1]), 8)
    assert rows[0].tolist() == [1, 2, 3, 5, 6, 7, -1, -1]
    assert similarities[0].tolist() == [0] * 6 + [-math.inf] * 2


def test_several_test_sets_with_their_own_candidates() -> None:
    """Catches votes for classes that a test set does not have, and results under the wrong set's name."""
    x = np.array([[1, 0.01], [1, 0.02], [1, 0.5], [0, 1]])
    train = features(image_set([0, 0, 2, 3]), x)
    own = features(image_set([2]), x[:1])
    other = features(image_set([2], name="subset", candidates=np.array([2, 3])), x[:1])
    results = [(m.data, m.value) for m in knn(train, [own, other], ks=(3,)) if m.metric == "top1"]
    assert results == [("tiny", 0.0), ("subset", 1.0)]
