"""Frozen statistics: values as ever, gradients of a network whose norms and GELUs multiply by constants.

The statistics 1 / rms(x) of a norm and the gate of GELU(x) = x (1 + tanh z) / 2 are functions of x, and the
ordinary gradient follows them too. With them frozen it says what x itself contributes: gradient times input
is then far more faithful to the model (see `MegaVit.frozen_statistics`). Only torch's own operators are used,
so that recomputation, torch.func and second derivatives work.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Frozen(NamedTuple):
    """What is constant for the gradient beside norms' statistics and GELU gates: with `halve_attention` half
    of each of the two factors of every block's attention (its weights and its values), so that gradient times
    input does not count their product twice."""

    halve_attention: bool = False


def halved(x: Tensor) -> Tensor:
    """`x`, to the bit, with half the gradient."""
    return x.detach() + (x - x.detach()) / 2


def multiple(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
    """`y`, to the bit, with the gradient of x times the constant `factors`.

    For whatever kernel has computed y: the added zero alone carries x's gradient. Products are in the dtype
    of the factors.
    """
    zero = x - x.detach()
    for factor in factors:
        zero = zero * factor.detach()
    return y + zero.to(y.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU (tanh form) with the gradient of x times its gate. Keeps the gate for backward, of x's size."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    gate = torch.sigmoid(math.sqrt(8 / math.pi) * wide * (1 + 0.044715 * wide.square()))
    return multiple(F.gelu(x.detach(), approximate="tanh"), x, gate.to(x.dtype))
