"""RMSNorm and LayerNorm over the last dim, statistics in float32 at least whatever the dtype.

Letters: D the normalised width, `...` any leading dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.model.frozen import multiple
from megavit.parallel.collectives import is_functorch_active


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """1 / rms of [..., D]: [..., 1]; reads x once and writes no square of it."""
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    return inverse.div_(wide.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * scale, saving x and one number a row.

    torch's own is fused on GPUs only: on a CPU it is five operations that save three tensors of x's size, in
    float32 (+3 D a token and block in float32, +11 D in bfloat16).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        wide = x.to(_statistics_dtype(x))
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, scale, inverse)
        return torch.mul(wide, inverse).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are wanted, in which `inverse` is a function of x
            y = F.rms_norm(x, scale.shape, scale, ctx.eps)
            wanted = [t for t, needed in zip((x, scale), ctx.needs_input_grad, strict=False) if needed]
            grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:2]), None
        width = x.shape[-1]
        wide, grad = x.to(_statistics_dtype(x)), grad.to(_statistics_dtype(x))
        out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
        products = torch.mul(grad, wide, out=out).view(-1, width)
        # Both sums as matrix-vector products: one pass over `products` each.
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = torch.mv(products.t(), inverse.reshape(-1)).to(scale.dtype)
        # dy/dx = scale / rms - x (x . scale) / (D rms^3), applied to grad
        along = torch.mv(products, scale.to(wide.dtype)).view(inverse.shape) * inverse.pow(3).div_(-width)
        grad_x = (grad * scale).mul_(inverse).addcmul_(wide, along)
        return grad_x.to(x.dtype), grad_scale, None


def has_fused_rms_norm(x: Tensor) -> bool:
    """Whether torch computes the RMS norm of `x` in one kernel."""
    return x.is_cuda or torch.compiler.is_compiling()


def normalize(
    x: Tensor, scale: Tensor, bias: Tensor | None, *, centring: bool, eps: float, frozen: bool = False
) -> Tensor:
    """x / rms(x) * scale (+ bias) over the last dim, about the mean if `centring`; statistics in float32 in
    any dtype. If `frozen`, rms(x) is a constant for the gradient."""
    if frozen:
        y = normalize(x.detach(), scale, bias, centring=centring, eps=eps)
        wide = x.to(_statistics_dtype(x))
        wide = wide - wide.mean(-1, keepdim=True) if centring else wide
        return multiple(y, wide, _inverse_rms(wide.detach(), eps), scale)
    if centring:
        return F.layer_norm(x, scale.shape, scale, bias, eps)
    torchs = has_fused_rms_norm(x) or is_functorch_active()
    y = F.rms_norm(x, scale.shape, scale, eps) if torchs else _RmsNorm.apply(x, scale, eps)
    return y if bias is None else y + bias
