"""From images to patch tokens, with the position embedding of a grid of any size.

Letters: B batch, C channels, P patch side, N patches, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megavit.model.config import ModelConfig
from megavit.model.head import wide
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.linear import is_autocast_enabled, linear

POSITION = "embed.position"  # the one weight that is resized to fit another image size


class PatchEmbedding(nn.Module):
    """[B, C, height, width] -> [B, N, D], N patches row by row: a convolution of stride P as one matmul, plus
    a learned position embedding, resized if the image is not of the configured size."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.channels, self.patch_size = config.channels, config.patch_size
        fan_in = config.channels * config.patch_size**2
        self.weight = init.lecun_normal("weight", Layout((config.dim, fan_in)))
        self.bias = init.constant("bias", Layout((config.dim,)), 0.0)
        self.position = init.normal("position", Layout((config.num_patches, config.dim)), config.dim**-0.5)

    def grid(self, img: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, C, height, width]."""
        return img.shape[-2] // self.patch_size, img.shape[-1] // self.patch_size

    def forward(self, img: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(img, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        # Resized anew each time: it costs at most 2% of a forward pass of one image, and a copy that is kept
        # would have to know of every way in which weights change (optimizers, ZeRO-3's gathering, loading).
        return linear(patches, self.weight, self.bias) + resize_position(self.position, self.grid(img))

    def check(self, img: Tensor) -> None:
        """Raise ValueError unless the patches tile `img`, of the right channels and dtype."""
        channels, patch = self.channels, self.patch_size
        if img.ndim != 4 or img.shape[1] != channels:
            hint = (
                "add a batch dim" if img.ndim == 3 else "permute the dims or build it with other `channels`"
            )
            raise ValueError(
                f"images of shape {tuple(img.shape)} do not fit this model, which takes "
                f"[batch, {channels}, height, width]; {hint}"
            )
        sides = tuple(img.shape[2:])
        if any(side % patch or not side for side in sides):
            height, width = (max(1, round(side / patch)) * patch for side in sides)
            raise ValueError(
                f"images of shape {tuple(img.shape)} do not fit this model, whose patches have {patch} x "
                f"{patch} pixels; resize or crop them from {sides[0]} x {sides[1]} to {height} x {width}"
            )
        weight = self.weight
        if img.dtype != weight.dtype and not is_autocast_enabled(weight.device.type):
            hint = (
                "scale them to floating point in [-1, 1] first, as megavit.data.device.to_model_input does"
                if not img.is_floating_point()
                else f"convert them with images.to({weight.dtype}), or use torch.autocast"
            )
            raise ValueError(f"images are {img.dtype}, the model's weights {weight.dtype}; {hint}")


def resize_position(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding [n^2, D] of an n x n grid, resized bilinearly to [rows * columns, D]; float32 at
    least inside."""
    old = round(position.shape[0] ** 0.5)
    if old * old != position.shape[0]:
        raise ValueError(f"a position embedding of {position.shape[0]} tokens is no square grid")
    if grid == (old, old):
        return position
    image = rearrange(wide(position), "(h w) d -> 1 d h w", h=old)
    image = F.interpolate(image, size=grid, mode="bilinear", antialias=True)
    return rearrange(image, "1 d h w -> (h w) d").to(position.dtype)
