"""Every form of GELU against the formula in float64."""

from __future__ import annotations

import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.model import gelu as module
from megavit.model.gelu import gelu

# More than two chunks, the last one short; the middle is where GELU bends.
CASES = {
    "bend": torch.linspace(-9, 9, 301),
    "chunks": torch.linspace(-3, 3, 2 * 64 + 7),
    "one chunk": torch.linspace(-3, 3, 64),
    "empty": torch.empty(0, 5),
    "far": torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4]),
    "transposed": torch.linspace(-4, 4, 200).view(2, 10, 10).transpose(1, 2),
}


def value_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = gelu(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gelu_on_cpus(case: str, threads: int) -> None:
    """Catches a wrong derivative, a chunk that is left out or read twice, and results in another order."""
    x = CASES[case]
    grad = torch.cos(torch.arange(float(x.numel()))).view(x.shape)
    exact = x.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    with (
        unittest.mock.patch.object(module, "_CHUNK", 64 // threads),
        unittest.mock.patch("torch.get_num_threads", return_value=threads),
    ):
        y, grad_x = value_and_gradient(x, grad)
    assert y.shape == grad_x.shape == x.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(grad_x.double(), wanted, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compiled_form(dtype: torch.dtype) -> None:
    """Catches a wrong constant in the form that compiled blocks use, and another dtype coming out."""
    x = torch.linspace(-9, 9, 1001).to(dtype)
    expected = value_and_gradient(x.double(), torch.ones(1001).double())
    with unittest.mock.patch("torch.compiler.is_compiling", return_value=True):
        compiled = value_and_gradient(x, torch.ones(1001).to(dtype))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0.08, torch.float64: 1e-12}[dtype]
    for mine, wanted in zip(compiled, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)


def test_gelu_keeps_its_input_alone() -> None:
    """Catches an intermediate kept for backward, 4 D a token and block each."""
    x = torch.randn(100, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gelu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
