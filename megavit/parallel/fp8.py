"""Matrix products in 8-bit floating point, for the linear layers of the blocks.

Both factors are rounded to e4m3 (4 bits of exponent, 3 of mantissa, at most 448), with one float32 scale for
each row of the left and each column of the right factor ("row-wise scaling"). The scales are made from the
values at hand, so there is no state that a checkpoint would hold. The products are torch's own, which add in
float32.

The layers keep their inputs and weights as they are, and round them again for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
# Sizes of matrices must be multiples of it (cuBLAS and CUTLASS read 16 bytes at once).
MULTIPLE = 16
# The first GPUs whose matrix units know e4m3: Ada (RTX 4090, L40S); Hopper is 9.0.
_CAPABILITY = (8, 9)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] as e4m3 and the float32 scales [n, 1] to multiply it by. NaN and infinity make their whole row
    NaN, so that a poisoned gradient is noticed as it is without fp8."""
    rows = rows.float()
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
    # Contiguous: the kernels want both factors row by row, and `rows` may be a transposed view.
    return (rows / scales).to(_E4M3).contiguous(), scales


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T (+ bias [m]): [n, k], [m, k] -> [n, m] in the dtype of `left`; m must be a multiple of 16.

    Costs a read of both factors to find the scales and a second one to round them, which torch.compile fuses
    with what made them.
    """
    padding = -left.shape[1] % MULTIPLE  # for the gradient of a weight: k counts tokens there
    if padding:
        left, right = F.pad(left, (0, padding)), F.pad(right, (0, padding))
    return product_of_rounded(rounded(left), rounded(right), left.dtype, bias)


def product_of_rounded(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """As `product`, of factors that are `rounded` already."""
    (left_8, left_scales), (right_8, right_scales) = left, right
    out: Tensor = F.scaled_mm(
        left_8,
        right_8.t(),
        left_scales,
        ScalingType.RowWise,
        right_scales.t(),
        ScalingType.RowWise,
        bias=bias,
        output_dtype=dtype,
    )
    return out


def check_device(device: torch.device, *, bf16: bool) -> None:
    """ValueError, with the fix, unless `product` runs on this device for an engine that computes in bfloat16
    (or else float32). A CPU rounds as a GPU does, and is slower than without."""
    if device.type != "cuda":
        some = torch.ones(MULTIPLE, MULTIPLE, device=device)
        try:
            product(some, some)
        except RuntimeError as error:
            raise ValueError(
                f"model.matmul fp8 is not in torch {torch.__version__} for a {device.type}; leave it out, or "
                f"install torch 2.15"
            ) from error
        return
    if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        raise ValueError(
            f"model.matmul fp8 needs a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} (Ada, "
            f"Hopper) or newer, and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; leave it "
            f"out"
        )
    if not bf16:
        raise ValueError(
            "model.matmul fp8 gives bfloat16 on a GPU, and this run computes in float32; say "
            "--ds.bf16.enabled true, or leave it out"
        )
