"""Layers of dense heads, on maps [B, C, h, w]: convolutions, changes of resolution, norms over positions.

Kernels are stored as matrices, so that checkpoints and exports cut them as any other weight. All are whole on
every TP rank.

Letters: B batch, C channels, h and w the sides of a map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.parallel.collectives import add_over_dp
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout

Ratio = Literal["x4", "x2", "x1", "/2"]
RATIOS: tuple[Ratio, ...] = ("x4", "x2", "x1", "/2")


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bilinear, to [B, C, *size]."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class Convolution(nn.Module):
    """[B, in, h, w] -> [B, out, h, w], or half the sides, rounded up, with a stride of 2. The input is
    converted to the weight's dtype."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        init: Initializer,
        *,
        size: int = 1,
        stride: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        self.size, self.stride = size, stride
        self.weight = init.xavier_uniform("weight", Layout((outputs, inputs * size**2)))
        self.bias = init.constant("bias", Layout((outputs,)), 0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.view(self.weight.shape[0], -1, self.size, self.size)
        return F.conv2d(x.to(kernel.dtype), kernel, self.bias, self.stride, self.size // 2)


class Rescale(nn.Module):
    """[B, C, h, w] -> [B, C, r h, r w], learned: a transposed convolution without overlap for x4 and x2,
    nothing for x1, a 3 x 3 convolution of stride 2 for /2, which rounds odd sides up."""

    def __init__(self, channels: int, ratio: Ratio, init: Initializer):
        super().__init__()
        self.factor = {"x4": 4, "x2": 2}.get(ratio, 1)
        self.convolution: Convolution | None = None
        self.bias: nn.Parameter | None = None
        if self.factor > 1:
            outputs = channels * self.factor**2
            self.convolution = Convolution(channels, outputs, init.scope("convolution"), bias=False)
            self.bias = init.constant("bias", Layout((channels,)), 0.0)
        elif ratio == "/2":
            self.convolution = Convolution(channels, channels, init.scope("convolution"), size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.convolution is None:
            return x
        x = self.convolution(x)
        return x if self.bias is None else F.pixel_shuffle(x, self.factor) + self.bias[:, None, None]


class GroupNorm(nn.Module):
    """Norm over the positions and channels of a group, of one image: no statistics to keep, and none of other
    images. As many groups as the greatest common divisor of the channels and 32."""

    def __init__(self, channels: int, init: Initializer):
        super().__init__()
        self.groups = next(count for count in (32, 16, 8, 4, 2, 1) if channels % count == 0)
        self.weight = init.constant("weight", Layout((channels,)), 1.0)
        self.bias = init.constant("bias", Layout((channels,)), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias)


class BatchNorm(nn.Module):
    """Norm of each channel over the positions of all usable images of a micro-batch, on all data-parallel
    ranks; in evaluation by running statistics, which checkpoints and exports hold. As torch's `SyncBatchNorm`
    (eps 1e-5, momentum 0.1), which knows neither a mesh nor unusable images.

    Costs two all-reduces of C numbers forward, and as many backward if the input has a gradient. float32.
    """

    EPS, MOMENTUM = 1e-5, 0.1
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, init: Initializer):
        super().__init__()
        self.mesh = init.mesh
        shape = Layout((channels,))
        self.weight = init.constant("weight", shape, 1.0)
        self.bias = init.constant("bias", shape, 0.0)
        self.register_buffer("running_mean", init.statistic("running_mean", shape, 0.0))
        self.register_buffer("running_var", init.statistic("running_var", shape, 1.0))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """`weights` [B]: 0 for images that take no part in the statistics."""
        x = x.float()
        mean, var = self._of_batch(x, weights) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * (var + self.EPS).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]

    def _of_batch(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        # Deviations are taken from the mean itself: in a ViT a channel's mean may be many of its deviations.
        shares = weights.float()[:, None, None, None]
        count = weights.float().sum() * x[0, 0].numel()
        sums = add_over_dp(self.mesh, torch.cat([(x * shares).sum((0, 2, 3)), count[None]]))
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        squares = (x - mean[:, None, None]).square() * shares
        var = add_over_dp(self.mesh, squares.sum((0, 2, 3))) / count
        with torch.no_grad():
            momentum = self.MOMENTUM * (sums[-1] > 0).float()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
        return mean, var

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As any module, but the statistics stay float32, the same tensors: bfloat16 has too few digits to
        add a tenth of a change to, and the engine holds them by reference."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.device == buffer.device:
                self._buffers[name] = buffer
        return self
