"""RMSNorm and LayerNorm over the last dim, statistics in float32 whatever the dtype.

Letters: D the normalised width, `...` any leading dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * scale, saving x and one number a row.

    torch's own is fused on GPUs only: on a CPU it is five operations that save three tensors of x's size, in
    float32 (+3 D a token and block in float32, +11 D in bfloat16).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        # [..., 1]; the norm reads x once and writes no square of it
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return torch.mul(wide, inverse).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable  # `inverse` is a number here, and no function of x
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        width = x.shape[-1]
        wide, grad = x.float(), grad.float()
        products = torch.mul(grad, wide, out=torch.empty(x.shape, device=x.device)).view(-1, width)
        # Both sums as matrix-vector products: one pass over `products` each.
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = torch.mv(products.t(), inverse.reshape(-1)).to(scale.dtype)
        # dy/dx = scale / rms - x (x . scale) / (D rms^3), applied to grad
        along = torch.mv(products, scale.float()).view(inverse.shape) * inverse.pow(3).div_(-width)
        grad_x = (grad * scale).mul_(inverse).addcmul_(wide, along)
        return grad_x.to(x.dtype), grad_scale, None


def has_fused_rms_norm(x: Tensor) -> bool:
    """Whether torch computes the RMS norm of `x` in one kernel."""
    return x.is_cuda or torch.compiler.is_compiling()


def normalize(x: Tensor, scale: Tensor, bias: Tensor | None, *, centring: bool, eps: float) -> Tensor:
    """x / rms(x) * scale (+ bias) over the last dim, about the mean if `centring`; statistics in float32 in
    any dtype."""
    if centring:
        return F.layer_norm(x, scale.shape, scale, bias, eps)
    fused = has_fused_rms_norm(x)
    y = F.rms_norm(x, scale.shape, scale, eps) if fused else _RmsNorm.apply(x, scale, eps)
    return y if bias is None else y + bias
