"""The grid of heads against torch's own SGD, head by head."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megavit.evaluate.protocols.rows import held_out_tenth
from megavit.evaluate.protocols.sgd import Batch, Heads, choose, epoch_batches, train_heads
from megavit.parallel.mesh import Mesh
from tests.evaluate.protocols.memory import digits, features, image_set, sgd

RATES = (1e-3, 0.02, 0.1)


def some_batches(count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        values = {name: torch.randn(32, dim, generator=generator) for name, dim in (("a", 6), ("b", 4))}
        yield values, torch.randint(0, 5, (32,), generator=generator)


def test_each_head_is_trained_as_by_torch() -> None:
    """Catches heads that mix (layers, rates), a rate that is not scaled by the batch, dampened momentum, a
    cosine that is one step off, and a loss that is summed."""
    start = train_heads([], Mesh.single(), {"a": 6, "b": 4}, 5, 0, 32, RATES)
    heads = train_heads(some_batches(7), Mesh.single(), {"a": 6, "b": 4}, 5, 7, 32, RATES)
    for layer in ("a", "b"):
        for number, rate in enumerate(RATES):
            weight = start[layer].weight[number].clone().requires_grad_()
            bias = start[layer].bias[number].clone().requires_grad_()
            optimizer = torch.optim.SGD([weight, bias], rate * 32 / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
            for values, labels in some_batches(7):
                optimizer.zero_grad()
                cross_entropy(values[layer] @ weight.T + bias, labels).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(heads[layer].weight[number], weight.detach(), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(heads[layer].bias[number], bias.detach(), atol=1e-6, rtol=1e-5)


def test_heads_start_alike() -> None:
    """Catches weights of another spread, rates that are compared from different starts, and a start that
    depends on which other layers are trained."""
    both = train_heads([], Mesh.single(), {"a": 600, "b": 4}, 50, 0, 32, RATES, seed=1)
    alone = train_heads([], Mesh.single(), {"b": 4}, 50, 0, 32, RATES, seed=1)
    assert both["a"].weight.std().item() == pytest.approx(0.01, rel=0.05) and not both["a"].bias.any()
    assert torch.equal(both["b"].weight, alone["b"].weight)
    assert torch.equal(both["a"].weight[0], both["a"].weight[2])
    other = train_heads([], Mesh.single(), {"b": 4}, 50, 0, 32, RATES, seed=2)
    assert not torch.equal(other["b"].weight, alone["b"].weight)


def test_number_of_batches_must_be_that_of_the_cosine() -> None:
    """Catches rates that rise again, or never come to 0."""
    for count in (3, 5):
        with pytest.raises(ValueError, match=r"the 4 batches|made for 4"):
            train_heads(some_batches(count), Mesh.single(), {"a": 6, "b": 4}, 5, 4)


def test_epoch_batches_hold_each_row_at_most_once() -> None:
    """Catches an order that repeats every epoch, rows drawn twice, and a last batch that is smaller."""
    rows = np.arange(5, 108)
    first, again, second = (epoch_batches(rows, 25, 0, epoch) for epoch in (0, 0, 1))
    assert [len(batch) for batch in first] == [25] * 4
    flat = np.concatenate(first)
    assert len(set(flat)) == 100 and set(flat) <= set(rows)
    np.testing.assert_array_equal(flat, np.concatenate(again))
    assert (flat != np.concatenate(second)).any()
    assert [sorted(batch) for batch in epoch_batches(rows, 200, 0, 0)] == [rows.tolist()]


def test_choice_is_made_on_the_held_out_rows() -> None:
    """Catches a head chosen by the rows it was trained on, a diverged head that wins by NaN, the wrong
    layer's probe, and a class that does not occur being predicted."""
    labels = np.array([0, 1] * 10)
    sign = np.where(labels == 0, 1.0, -1.0)
    held = np.array([1, 2, 5])
    good = np.stack(
        [np.where(np.isin(np.arange(20), held), sign, -sign)] * 2, 1
    )  # right on held-out rows only
    train = {
        "a": features(image_set(labels, 3), good, layer="a"),
        "b": features(image_set(labels, 3), np.zeros((20, 2)), layer="b"),
    }
    best = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [50.0, 50.0]])
    layer_a = torch.stack([-best, best * math.nan, best, best * 0.5])
    layer_a[:, 2] = 0
    heads = {"b": Heads(torch.zeros(4, 3, 2), torch.zeros(4, 3)), "a": Heads(layer_a, torch.zeros(4, 3))}
    layer, probe, settings = choose(heads, train, held, (0.1, 0.2, 0.3, 0.4))
    assert (layer, settings["layer"], settings["rate"], settings["held_out_top1"]) == ("a", "a", 0.3, 1.0)
    assert torch.equal(probe.weight[:2].float(), best[:2])
    assert set(probe(torch.randn(500, 2) * 100).argmax(1).tolist()) == {0, 1}
    with pytest.raises(ValueError, match="finite"):
        choose({"a": Heads(layer_a[1:2], torch.zeros(1, 3))}, train, held, (0.1,))


def test_learns_digits() -> None:
    """Catches rates of which none learns, and a result on other images than the test set's."""
    train, test = digits()
    kept, held = held_out_tenth(train)
    values = next(iter(train.mine())).values.new_zeros(1437, 64)
    for piece in train.mine():
        values[piece.rows] = piece.values
    batches = [rows for epoch in range(10) for rows in epoch_batches(kept, 64, 0, epoch)]
    stream = (({"pooled": values[rows]}, torch.from_numpy(train.labels[rows, 0])) for rows in batches)
    top1, _ = sgd(stream, len(batches), 64, {"pooled": train}, [{"pooled": test}], held)
    assert top1.value > 0.88 and top1.count == (360, 360, 0)
    assert top1.settings["held_out_top1"] > 0.95 and top1.settings["steps"] == 200
