"""Gradients with frozen statistics: those of a network whose norms and GELUs multiply by what they once
did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import megavit.model.block as block
from megavit import MegaVit
from megavit.model.frozen import gelu
from megavit.model.norm import normalize
from megavit.parallel.mesh import Mesh
from tests.model.test_observe import VARIANTS, Recorder, build, close
from tests.model.test_vit import images
from tests.ranks import run_ranks

SINGLE = {name: fields | {"dropout": 0.0} for name, fields in VARIANTS.items()}


def spread(model: MegaVit) -> MegaVit:
    """Norm scales and biases that are not what they start as."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("_scale"):
            values = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.data.copy_(values)
    return model


def image_gradient(model: MegaVit, x: Tensor, frozen: bool = True, **mode: bool) -> tuple[Tensor, Tensor]:
    """The gradient of two classes' scores, and the logits. Backward runs when the context has ended."""
    x = x.clone().requires_grad_()
    if frozen:
        with model.frozen_statistics(**mode):
            logits = model(x)
    else:
        logits = model(x)
    return torch.autograd.grad(logits[:, [1, 3]].sum(), x)[0], logits.detach()


class Replayed:
    """Stands in for the model's norm and GELU: records their constants in a first pass, and multiplies by
    them in all later ones. Nothing of the mode itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, halve_attention: bool):
        self.constants: list[Tensor] = []
        self.replay: Iterator[Tensor] | None = None
        monkeypatch.setattr(block, "normalize", self.normalize)
        monkeypatch.setattr(block.F, "gelu", self.gelu)
        if halve_attention:
            monkeypatch.setattr(block, "attend", self.attend)

    def constant(self, value: Tensor) -> Tensor:
        if self.replay is not None:
            return next(self.replay)
        self.constants.append(value)
        return value

    def start(self) -> None:
        self.replay = iter(self.constants)

    def normalize(
        self, x: Tensor, scale: Tensor, bias: Any, *, centring: bool, eps: float, frozen: bool
    ) -> Any:
        x = x - x.mean(-1, keepdim=True) if centring else x
        y = x * self.constant((x.square().mean(-1, keepdim=True) + eps) ** -0.5) * scale
        return y if bias is None else y + bias

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        return x * self.constant((1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, explicit: bool) -> tuple[Tensor, None]:
        """The mean of the two products of which one factor moves."""
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ self.constant(v) + self.constant(weights) @ v) / 2, None


@pytest.mark.parametrize("halve_attention", [False, True])
@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_finite_differences_of_a_network_with_constant_statistics(
    name: str, halve_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a norm or a GELU that keeps its ordinary gradient (QK norm, the MAP head's, a second one of a
    sequential block), and one that lost more than its statistics (a LayerNorm's mean)."""
    model = spread(build(**SINGLE[name])).double()
    x = images(1).double()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    frozen = float((image_gradient(model, x, halve_attention=halve_attention)[0] * direction).sum())
    ordinary = float((image_gradient(model, x, frozen=False)[0] * direction).sum())

    replayed = Replayed(monkeypatch, halve_attention)
    in_block = 2 + 2 * model.config.qk_norm + (model.config.block == "sequential") + 2 * halve_attention
    with torch.no_grad():
        model(x)
        assert len(replayed.constants) == model.config.depth * in_block + 1 + 2 * (model.pool is not None)
        scores = []
        for step in (1e-5, -1e-5):
            replayed.start()
            scores.append(float(model(x + step * direction)[:, [1, 3]].sum()))
    assert frozen == pytest.approx((scores[0] - scores[1]) / 2e-5, rel=1e-6)
    assert abs(frozen - ordinary) > 1e-2 * abs(ordinary)


@pytest.mark.parametrize("name", SINGLE)
def test_evidence_of_a_lone_patch_is_all_of_the_logit(name: str) -> None:
    """Catches any share of the output that gradient times input misses. A lone token attends to itself,
    so without biases the frozen network is linear in its embedding, and the sum is exact."""
    fields = SINGLE[name] | {"image_size": 4, "num_registers": 0, "pool": "map"}
    model = spread(build(**fields)).double()
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):
            parameter.data.zero_()

    class Input:
        def tokens(self, layer: int, x: Tensor) -> None:
            if layer == -1:
                self.x = x

    with model.frozen_statistics(), model.observe(Input()) as seen:
        logit = model(images(1, 4).double())[0, 1]
    (gradient,) = torch.autograd.grad(logit, seen.x)
    torch.testing.assert_close((gradient * seen.x).sum(), logit, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_stay_and_gradients_outside_too(name: str, dtype: torch.dtype) -> None:
    """Catches logits that move, and a mode that lasts: after it, one inside another, and an exception."""
    model = spread(build(**VARIANTS[name])).eval().to(dtype)
    x = images(2).to(dtype)
    before, logits = image_gradient(model, x, frozen=False)
    inside, same = image_gradient(model, x)
    halved, as_well = image_gradient(model, x, halve_attention=True)
    assert torch.equal(logits, as_well) and not torch.equal(inside, halved)
    assert torch.equal(logits, same) and not torch.equal(before, inside)
    with pytest.raises(ZeroDivisionError), model.frozen_statistics():
        assert torch.equal(image_gradient(model, x, halve_attention=True)[0], halved)
        assert torch.equal(image_gradient(model, x, frozen=False)[0], inside)
        raise ZeroDivisionError
    assert torch.equal(image_gradient(model, x, frozen=False)[0], before)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recompute_policy_has_the_same_gradients(name: str) -> None:
    """Catches recomputation that follows the mode of the backward pass instead of the forward pass."""
    expected, _ = image_gradient(spread(build(**SINGLE[name])), images(2))
    for policy in ["full"] if name == "sequential" else ["full", "selective"]:
        model = spread(build(policy, **SINGLE[name]))
        torch.testing.assert_close(image_gradient(model, images(2))[0], expected)
        x = images(2).requires_grad_()
        logits = model(x)
        with model.frozen_statistics():  # of an ordinary pass
            (ordinary,) = torch.autograd.grad(logits[:, [1, 3]].sum(), x)
        torch.testing.assert_close(ordinary, image_gradient(model, images(2), frozen=False)[0])


def test_weights_keep_their_ordinary_share() -> None:
    """Catches norm scales and biases without a gradient: the last norm's, behind which nothing is frozen."""
    grads = []
    for is_frozen in (False, True):
        model = spread(build(pool="mean", norm_bias=True))
        if is_frozen:
            with model.frozen_statistics():
                model(images(2))[:, 1].sum().backward()
        else:
            model(images(2))[:, 1].sum().backward()
        grads.append(
            {name: p.grad for name, p in model.named_parameters() if name.startswith(("norm", "head"))}
        )
    assert len(grads[0]) == 4 and close(grads[1], grads[0])


def test_an_observer_is_told_the_same_and_hears_frozen_gradients() -> None:
    """Catches an explicit attention path, or the MAP head's, that forgets the mode."""
    model = spread(build())
    with model.frozen_statistics():
        fused, _ = image_gradient(model, images(2))
        with model.observe(Recorder()) as recorder:
            explicit, _ = image_gradient(model, images(2))
    torch.testing.assert_close(explicit, fused)
    assert recorder.grads.keys() == recorder.seen.keys()


def test_compiled_blocks_run_uncompiled() -> None:
    """Catches the mode lost in a compiled graph, or a second graph compiled for it."""
    torch.compiler.reset()
    model, count = spread(build()), 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    expected, _ = image_gradient(model, images(2))
    ordinary, _ = image_gradient(model, images(2), frozen=False)
    compile_with, torch.compile = torch.compile, lambda f: compile_with(f, backend=backend)
    try:
        model.compile_blocks()
    finally:
        torch.compile = compile_with
    torch.testing.assert_close(image_gradient(model, images(2), frozen=False)[0], ordinary)
    compiled = count
    torch.testing.assert_close(image_gradient(model, images(2))[0], expected)
    assert count == compiled > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_every_class_by_torch_func() -> None:
    """Catches a mode that torch.func cannot take apart."""
    model = spread(build())
    with model.frozen_statistics():
        each = vmap(grad(lambda c, x: model(x[None])[0] @ c, 1), in_dims=(0, None))(
            torch.eye(5), images(1)[0]
        )
    expected = image_gradient(model, images(1))[0][0]
    torch.testing.assert_close(each[1] + each[3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_multiplications(dtype: torch.dtype) -> None:
    """Catches statistics that are not float32, and gates of another form of GELU, far from zero too."""
    x = (torch.randn(3, 33, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).requires_grad_()
    scale = torch.rand(33).to(dtype)
    for y in (
        gelu(x),
        normalize(x, scale, None, centring=False, eps=1e-6, frozen=True),
    ):
        (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        expected = y.detach().double() / x.detach().double()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance / 10)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


def differences_from_single(tp_size: int) -> list[str]:
    mesh, wrong = Mesh.from_environment(tp_size), []
    for name, fields in VARIANTS.items():
        fields = fields | {"dropout": 0.0}
        expected, logits = image_gradient(build(**fields), images(2))
        for policy in ["none", "full"] if name == "sequential" else ["none", "full", "selective"]:
            found, same = image_gradient(build(policy, mesh, **fields), images(2))
            if not close({"gradient": found, "logits": same}, {"gradient": expected, "logits": logits}):
                wrong.append(f"{name}, {policy}")
    return wrong


@pytest.mark.dist
def test_sharded_gradients_are_those_of_a_single_process() -> None:
    """Catches a shard whose gradient lacks the other ranks' shares."""
    assert run_ranks(2, differences_from_single, 2) == [[]] * 2


def test_only_the_model_in_the_context_is_frozen() -> None:
    """Catches a mode that is global."""
    model, other = build(), build()
    with model.frozen_statistics():
        found, _ = image_gradient(other, images(1), frozen=False)
    assert torch.equal(found, image_gradient(other, images(1), frozen=False)[0])
