"""The path of a decision: that a block's two writes are what it adds, and that their shares add up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megavit import MegaVit
from megavit.explain.path import path
from megavit.explain.target import Target
from megavit.parallel.mesh import Mesh
from tests.explain.test_maps import photos, target
from tests.model.test_observe import VARIANTS, build
from tests.ranks import run_ranks

KINDS: dict[str, dict[str, Any]] = VARIANTS | {"mean": {"pool": "mean", "num_registers": 1}}


class Keeper:
    """The states and the writes of one pass."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []

    def tokens(self, layer: int, x: Tensor) -> None:
        assert layer == len(self.states) - 1
        self.states.append(x)

    def writes(self, layer: int, attention: Tensor, mlp: Tensor) -> None:
        assert layer == len(self.written)
        self.written.append((attention, mlp))


def moved(model: MegaVit) -> MegaVit:
    """Every parameter away from its initial value, the same at any TP size: biases are not zero."""
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        layout = parameter.tp_layout
        noise = torch.randn(layout.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            parameter.add_(0.1 * layout.take(noise, model.mesh.tp_rank, model.mesh.tp_size))
    return model.eval()


def observed(model: MegaVit) -> tuple[Keeper, Tensor]:
    with model.observe(Keeper()) as seen:
        return seen, model(photos(2))


@pytest.mark.parametrize("name", KINDS)
def test_the_writes_and_the_input_are_the_output(name: str) -> None:
    """Catches a bias that is left out or counted twice, layer scale on one of the two, and a pass that is
    another one for being watched."""
    model = moved(build(**KINDS[name]))
    seen, logits = observed(model)
    assert (model(photos(2)) - logits).abs().max() < 1e-5 * logits.abs().max()
    for (before, after), (attention, mlp) in zip(pairwise(seen.states), seen.written, strict=True):
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)
        assert attention.abs().max() > 1e-3 and mlp.abs().max() > 1e-3
    attention, mlp = seen.written[1]
    block = model.blocks[1]
    without = {n: torch.zeros_like(p) for n, p in block.named_parameters() if n.startswith("mlp.down")}
    alone = torch.func.functional_call(block, without, (seen.states[1],)) - seen.states[1]
    torch.testing.assert_close(attention, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_recompute_policy_tells_the_same_writes(name: str) -> None:
    """Catches writes that are told twice, drop out of the graph, or are uninitialised memory."""
    expected, _ = observed(moved(build(**KINDS[name])))
    for policy in ["full"] if KINDS[name].get("block") == "sequential" else ["full", "selective"]:
        plain, model = (moved(build(kind, **KINDS[name])) for kind in ("none", policy))
        found, logits = observed(model)
        for mine, theirs in zip(found.written, expected.written, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        grads = torch.autograd.grad(logits[:, 1].sum(), [*found.written[0], *model.parameters()])
        assert all(grad.abs().max() > 0 for grad in grads[:2])
        wanted = torch.autograd.grad(plain(photos(2))[:, 1].sum(), list(plain.parameters()))
        for grad, want in zip(grads[2:], wanted, strict=True):
            assert (grad - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_a_path_is_what_its_parts_are_by_themselves(name: str) -> None:
    """Catches states of another block, a read-out without the final norm, and shares of another image."""
    model = moved(build(**KINDS[name]))
    found = path(model, photos(2), target(2), loss="softmax")
    seen, logits = observed(model)
    states = model.forward_intermediates(photos(2), norm=True, output_fmt="NLC", return_prefix_tokens=True)[1]
    for layer, state in enumerate(states):
        tokens = torch.cat(state[::-1], 1) if isinstance(state, tuple) else state
        read = model.forward_head(tokens)
        torch.testing.assert_close(found.scores[:, layer + 1], target(2).score(read), rtol=1e-4, atol=1e-5)
    for row, probability in enumerate(target(2).probability(logits, "softmax").tolist()):
        assert found.probabilities[row, -1].item() == pytest.approx(probability, rel=1e-4)
    total = found.start + found.attention.sum(1) + found.mlp.sum(1) + found.rest
    torch.testing.assert_close(total, found.scores[:, -1])
    with model.frozen_statistics():
        last = seen.states[-1].detach().requires_grad_()
        score = target(2).score(model.read_out(last)).sum()
    (gradient,) = torch.autograd.grad(score, last)
    for layer, written in enumerate(seen.written):
        for part, tensor in zip((found.attention, found.mlp), written, strict=True):
            expected = (gradient * tensor).sum((1, 2))
            torch.testing.assert_close(part[:, layer], expected, rtol=1e-3, atol=1e-5)
    assert found.attention_norms.shape == (2, 3) and found.token_norms.shape == (2, 4)
    assert not found.scores.requires_grad


def differences_from_single(tp_size: int) -> list[str]:
    mesh, wrong = Mesh.from_environment(tp_size), []
    for name, fields in KINDS.items():
        for policy in ("none", "full"):
            whole, mine = moved(build(**fields)), moved(build(policy, mesh, **fields))
            expected, logits = observed(whole)
            found, same = observed(mine)
            if (same - logits).abs().max() > 1e-5 * logits.abs().max():
                wrong.append(f"{name}, {policy}: logits")
            for a, b in zip(sum(expected.written, ()), sum(found.written, ()), strict=True):
                if not (a - b).abs().max() <= 1e-5 * a.abs().max():
                    wrong.append(f"{name}, {policy}: writes")
            grads = [
                torch.autograd.grad(y[:, 1].sum(), seen.written[0])
                for y, seen in ((logits, expected), (same, found))
            ]
            for a, b in zip(*grads, strict=True):
                if not (a - b).abs().max() <= 1e-4 * a.abs().max():
                    wrong.append(f"{name}, {policy}: gradients of writes")
        goal = Target(torch.tensor([1, 2]))
        for part, a, b in zip(
            path(whole, photos(2), goal)._fields,
            path(whole, photos(2), goal),
            path(mine, photos(2), goal),
            strict=True,
        ):
            if not (a.float() - b.float()).abs().max() <= 2e-5 * a.float().abs().max().clamp(min=1e-3):
                wrong.append(f"{name}: {part} {a} {b}")
    return wrong


@pytest.mark.dist
def test_ranks_have_the_path_of_a_single_process() -> None:
    """Catches partial sums that are told as wholes, and biases once a rank."""
    assert run_ranks(2, differences_from_single, 2) == [[]] * 2
