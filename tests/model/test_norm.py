"""The norm of CPUs against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.model.norm import normalize

WIDTH = 33


def inputs(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 5, 3, WIDTH] as attention has it (not contiguous), scale, bias."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 5, WIDTH).mul_(3).add_(0.5).to(dtype).transpose(1, 2)
    return (
        x.requires_grad_(),
        torch.randn(WIDTH).to(dtype).requires_grad_(),
        torch.randn(WIDTH).to(dtype).requires_grad_(),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype: torch.dtype, biased: bool) -> None:
    """Catches a wrong gradient, one summed over the wrong dim, and statistics taken in bfloat16."""
    x, scale, bias = inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, scale, bias)]
    y = normalize(x, scale, bias if biased else None, centring=False, eps=1e-6)
    expected = F.rms_norm(exact[0], (WIDTH,), exact[1], 1e-6) + (exact[2] if biased else 0)
    assert y.dtype == dtype and y.shape == x.shape
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y * weights.to(dtype)).sum().backward()
    (expected * weights.to(dtype).double()).sum().backward()
    found = [y, x.grad, scale.grad, *([bias.grad] if biased else [])]
    wanted = [expected, exact[0].grad, exact[1].grad, exact[2].grad]
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(found, wanted, strict=False):
        assert mine is not None and theirs is not None
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < tolerance, error


def test_frozen_scale_and_frozen_input() -> None:
    """Catches a gradient that is only right when both are asked for."""
    x, scale, _ = inputs(torch.float32)
    both = torch.autograd.grad(normalize(x, scale, None, centring=False, eps=1e-6).square().sum(), (x, scale))
    for index in (0, 1):
        part = [x, scale]
        part[1 - index] = part[1 - index].detach()
        y = normalize(part[0], part[1], None, centring=False, eps=1e-6)
        (alone,) = torch.autograd.grad(y.square().sum(), (part[index],))
        assert torch.equal(alone, both[index])


def test_rms_norm_keeps_its_input_and_a_number_a_row() -> None:
    """Catches the float32 copies that torch's keeps on a CPU."""
    x, scale, _ = inputs(torch.bfloat16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normalize(x, scale, None, centring=False, eps=1e-6)
    assert sum(kept.values()) == x.numel() + WIDTH + x.numel() // WIDTH
