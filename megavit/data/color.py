"""Colour jitter: by how much each sample's colours change is decided with its other random numbers, and done
on the device to whole micro-batches.

Letters: B batch, S image side, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megavit.data.config import DataConfig

NUM_COLOR_RANDOM = 8  # uniforms that one sample consumes
_GREY = (0.2989, 0.587, 0.114)


def color_changes(config: DataConfig, u: np.ndarray) -> np.ndarray | None:
    """Factors of brightness, contrast and saturation, and the turn of the hue, float32 [B, 4], by the
    uniforms `u` [B, NUM_COLOR_RANDOM]; None if the configuration changes none."""
    widths = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    if not widths.any():
        return None
    same = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(same - widths, [0.0, 0.0, 0.0, -0.5])
    found = low + (same + widths - low) * u[:, :4]
    return np.where(u[:, 4:] < config.color_share, found, same).astype(np.float32)


def change_colors(images: Tensor, changes: Tensor) -> Tensor:
    """uint8 [B, ..., S, S, C] with changed colours, rounded to uint8 again. `changes` [B, 4] are those of
    `color_changes`."""
    numbers = changes.to(images.device, non_blocking=True)
    found = jitter(images.movedim(-1, 0).float().div_(255), numbers)
    return found.mul_(255).round_().to(torch.uint8).movedim(0, -1).contiguous()


def jitter(planes: Tensor, changes: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, of float32 [C, B, ..., S, S] in [0, 1], for
    each sample its own, as torchvision's `adjust_brightness` etc. define them. Of grey pictures brightness
    and contrast alone change."""
    brightness, contrast, saturation, hue = (
        column.view(-1, *[1] * (planes.dim() - 2)) for column in changes.unbind(1)
    )
    planes = (planes * brightness).clamp_(0, 1)
    mean = _grey(planes).mean((-2, -1), keepdim=True)
    planes = torch.lerp(mean.expand_as(planes), planes, contrast).clamp_(0, 1)
    if len(planes) == 1:
        return planes
    planes = torch.lerp(_grey(planes).expand_as(planes), planes, saturation).clamp_(0, 1)
    return _turn_hue(planes, hue)


def _grey(planes: Tensor) -> Tensor:
    """[C, ...] -> [...]."""
    if len(planes) == 1:
        return planes[0]
    return torch.einsum("c...,c->...", planes, planes.new_tensor(_GREY))


def _turn_hue(planes: Tensor, turn: Tensor) -> Tensor:
    """[3, ...] whose hue, in [0, 1), has `turn` added to it. Value and saturation stay."""
    high, low = planes.amax(0), planes.amin(0)
    spread = high - low
    # The distance of each colour from the highest one tells where in its third of the circle the hue lies.
    red, green, blue = (high - planes) / torch.where(spread > 0, spread, 1.0)
    hue = torch.where(planes[1] == high, 2 + red - blue, 4 + green - red)
    hue = torch.where(planes[0] == high, blue - green, hue)
    hue = torch.where(spread > 0, hue / 6, 0) + turn
    # Each colour is highest in a third of the circle around its own hue, and falls to the lowest beside it.
    own = planes.new_tensor([0.0, 1 / 3, 2 / 3]).view(-1, *[1] * hue.dim())
    away = (hue - own + 0.5).remainder(1) - 0.5  # in [-1/2, 1/2)
    return low + spread * (2 - 6 * away.abs()).clamp(0, 1)
