"""The linear layers' matmuls against plain torch, for each way in which they may be computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megavit.parallel.linear import _Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extra", ["nothing", "bias", "addend"])
def test_linear_is_torchs(dtype: torch.dtype, extra: str) -> None:
    """Catches a transposed weight, a bias left out, an addend overwritten in place, and a strided input read
    as if it were dense."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 22, dtype=dtype)[..., ::2]  # [3, 5, 11]
    weight, bias, addend = (torch.randn(size, dtype=dtype) for size in ((7, 11), (7,), (3, 5, 7)))
    added = {"nothing": [], "bias": [bias], "addend": [addend]}[extra]
    before = addend.clone()

    def ours(x: Tensor, weight: Tensor, *added: Tensor) -> Tensor:
        slots = (None, *added) if extra == "addend" else (*added, None, None)
        return _Linear.apply(x, weight, *slots[:2], False)

    def plain(x: Tensor, weight: Tensor, *added: Tensor) -> Tensor:
        return x @ weight.t() + sum(added)

    results = []
    for way in (ours, plain):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, *added)]
        out = way(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    assert torch.equal(addend, before)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
