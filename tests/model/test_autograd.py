"""The model under torch's own machinery: autocast, second derivatives, torch.func, odd inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavit import MegaVit
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from tests.model.test_observe import build
from tests.model.test_vit import SMALL
from tests.ranks import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "vit-22b": {},
    "sequential": {"block": "sequential"},
    "class token": {"pool": "cls", "num_registers": 2, "layer_scale": 0.1},
    "layer norm": {"norm_centring": True, "norm_bias": True, "qkv_bias": True},
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> MegaVit:
    made = MegaVit(**(SMALL | VARIANTS[request.param]))
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(0))
    return made


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_autocast_trains_and_keeps_logits_in_float32(model: MegaVit) -> None:
    """Catches layers that meet two dtypes under autocast, in backward too, and logits rounded by it."""
    expected = model(images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images(2))
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_second_derivatives(model: MegaVit) -> None:
    """Catches a backward pass that takes a norm's statistics for constants: against a finite difference."""
    model = model.double()

    def squared_gradient(x: torch.Tensor, create_graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=create_graph)
        return x, gradient.square().sum()

    x, direction = images(1).double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        at, value = squared_gradient(x, True)
        (second,) = torch.autograd.grad(value, at)
        ahead, behind = (squared_gradient(x + sign * 1e-5 * direction, False)[1] for sign in (1, -1))
    assert float((second * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-4)


def loss_of_one(model: MegaVit, weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    return functional_call(model, weights, (image[None],)).square().sum()


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients_of_each(model: MegaVit, given: torch.Tensor) -> dict[str, torch.Tensor]:
    """[B, ...] of every parameter, by torch.func."""
    return vmap(grad(partial(loss_of_one, model)), in_dims=(None, 0))(weights_of(model), given)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_by_torch_func(model: MegaVit) -> None:
    """Catches layers that torch.func cannot take apart, or takes apart wrongly."""
    each = gradients_of_each(model, images(3))
    for i in range(3):
        model.zero_grad()
        model(images(3)[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_torch_func_on_a_model_that_recomputes(policy: Any) -> None:
    """Catches checkpointing under torch.func, which has no hooks for saved tensors; the way from an image of
    another size, too."""
    given = torch.rand(2, 3, 8, 24, generator=torch.Generator().manual_seed(1))
    plain, recomputing = (gradients_of_each(MegaVit(**SMALL, recompute=p), given) for p in ("none", policy))
    assert all(torch.equal(plain[name], recomputing[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_of_one_part(model: MegaVit) -> None:
    """Catches a classifier or a MAP head that cannot be called by itself with weights of one's own."""
    inputs = {"head": torch.randn(3, 32), "pool": torch.randn(3, 16, 32)}
    for part, module in model.named_children():
        if part not in inputs:
            continue

        def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, module: Any = module) -> torch.Tensor:
            return functional_call(module, weights, (x[None],)).square().sum()

        each = vmap(grad(loss), in_dims=(None, 0))(weights_of(module), inputs[part])
        for i in range(3):
            module.zero_grad()
            module(inputs[part][i : i + 1]).square().sum().backward()
            for name, parameter in module.named_parameters():
                torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-3, atol=1e-4)


def gradients_that_differ(tp_size: int) -> list[str]:
    mesh, wrong = Mesh.from_environment(tp_size), []
    for variant, fields in VARIANTS.items():
        single, sharded = (build(mesh=m, **fields) for m in (None, mesh))
        expected, found = (gradients_of_each(m, images(2)) for m in (single, sharded))
        for name, parameter in sharded.named_parameters():
            layout = layout_of(parameter)
            each = torch.stack([layout.take(one, mesh.tp_rank, tp_size) for one in expected[name]])
            if (found[name] - each).abs().max() > 2e-5 * expected[name].abs().max().clamp(min=1e-2):
                wrong.append(f"{variant}: {name}")
    return wrong


@pytest.mark.dist
def test_gradients_of_each_sample_on_two_ranks() -> None:
    """Catches collectives that torch.func cannot take apart, and sums over ranks that it leaves out."""
    assert run_ranks(2, gradients_that_differ, 2) == [[]] * 2


def test_no_images_give_no_logits(model: MegaVit) -> None:
    """Catches a last batch that is empty and ends an evaluation."""
    assert model(images(2)[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"images are torch.uint8, .* in \[-1, 1\] first"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), r"convert them with images.to\(torch.float32\)"),
        (torch.zeros(3, 16, 16), r"images of shape \(3, 16, 16\) do not fit"),
        (torch.zeros(1, 16, 16, 3), r"takes \[batch, 3, height, width\]"),
    ],
)
def test_images_that_do_not_fit_are_named(given: torch.Tensor, words: str) -> None:
    """Catches errors that come from deep inside a matmul."""
    with pytest.raises(ValueError, match=words):
        MegaVit(**SMALL)(given)
