"""Every protocol on one rank and on several, with rows that no number of ranks divides."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megavit.evaluate.protocols.fewshot import fewshot
from megavit.evaluate.protocols.knn import knn, nearest
from megavit.evaluate.protocols.linear import fit, linear
from megavit.evaluate.protocols.rows import held_out_tenth
from megavit.evaluate.protocols.sgd import epoch_batches
from megavit.parallel.mesh import Mesh
from tests.evaluate.protocols.memory import digits, sgd
from tests.ranks import run_ranks


def measure(mesh: Mesh) -> list[Any]:
    """All numbers of all protocols, and some of what is behind them."""
    train, test = digits(mesh, train=211, test=97)
    values, queries = train.take(train.usable), test.take(test.usable[:9])
    train.take = train.everywhere = None  # type: ignore[method-assign,assignment]
    found = [*knn(train, [test], ks=(5, 300)), *fewshot(train, [test], shots=(2, 25), seeds=(0, 1))]
    found += linear(train, [test], c_values=(1e-4, 1e-2))
    kept, held = held_out_tenth(train)
    batches = epoch_batches(kept, 3, 0, 0)
    own = (rows[mesh.dp_rank :: mesh.dp_size] for rows in batches)  # the last of four ranks has none
    stream = (({"pooled": values[rows]}, torch.from_numpy(train.labels[rows, 0])) for rows in own)
    found += sgd(stream, len(batches), 3, {"pooled": train}, [{"pooled": test}], held)
    probe, _ = fit(train, (1e-4,))
    similarities, rows = nearest(train, queries, 30)
    numbers = [(m.metric, m.value, m.stderr, m.count, dict(m.settings)) for m in found]
    return [*numbers, probe.weight.tolist(), similarities.tolist(), rows.tolist()]


def measure_on(tp_size: int) -> list[Any]:
    return measure(Mesh.from_environment(tp_size))


@cache
def on_one() -> list[Any]:
    return measure(Mesh.single())


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5), (one, other)
    else:
        assert one == other


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
def test_same_results_on_any_ranks(ranks: int, tp_size: int) -> None:
    """Catches rows that are counted twice or not at all, a rank without rows that waits or crashes, a mean
    of the ranks' means, shots, held-out rows or ties that depend on who holds them, ranks of which each
    finds another result, and training features that are brought together."""
    results = run_ranks(ranks, measure_on, tp_size)
    for found in results:
        assert found == results[0]
    assert_close(on_one(), results[0])


def test_test_set_is_as_long_as_it_should_be() -> None:
    """Catches a comparison of two empty lists."""
    assert len(on_one()) == 4 + 2 + 2 + 2 + 3
    assert np.isfinite([number[1] for number in on_one()[:10]]).all()
