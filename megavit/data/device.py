"""What is left to do with a batch on the device: normalise, mirror, blend pairs.

Letters: B batch, S image side, C channels, K classes of this rank. uint8 crosses the bus, a quarter of
float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(part: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. Nothing waits: a GPU copies it from pinned memory on a stream of its
    own, while it goes on with what it has been told before."""
    if device.type != "cuda" or part.is_cuda:
        return part.to(device)
    copies, current = _copy_stream(device), torch.cuda.current_stream(device)
    pinned = part if part.is_pinned() else part.pin_memory()
    with torch.cuda.stream(copies):
        copy = pinned.to(device, non_blocking=True)
    current.wait_stream(copies)
    copy.record_stream(current)  # its memory belongs to the stream that made it
    return copy


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def mirror(field: Tensor, flips: Tensor) -> Tensor:
    """[B, S, S, ...], mirrored left to right where `flips`, bool [B], says so: every field that is a square
    of pixels, as its picture."""
    chosen = to_device(flips, field.device).view(-1, *[1] * (field.dim() - 1))
    return torch.where(chosen, field.flip(2), field)


def to_model_input(images: Tensor, device: torch.device, flips: Tensor | None = None) -> Tensor:
    """uint8 [B, S, S, C] -> float32 [B, C, S, S] in [-1, 1] on `device`, as the paper's family is trained.

    Pictures that are float32 already keep their values. `flips`, bool [B], says which images are mirrored.
    """
    images = to_device(images, device)
    if flips is not None:
        images = mirror(images, flips)
    planes = images.permute(0, 3, 1, 2)
    return planes if images.is_floating_point() else planes.float().div_(127.5).sub_(1.0)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """uint8 [B, S, S, C] -> float32 [B, C, S, S] on `device`: pixels in [0, 1] less the mean of each channel,
    by its standard deviation."""
    found = to_model_input(images, device)  # as with a mean and std of 0.5, which training has
    if all(value == 0.5 for value in (*mean, *std)):
        return found
    shift, scale = (torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (mean, std))
    return (found * 0.5 + 0.5 - shift) / scale


def blend(images: Tensor, targets: Tensor, weights: Tensor, blends: Tensor) -> tuple[Tensor, Tensor]:
    """mixup and cutmix of slots 2k and 2k+1: images [B, C, S, S] and targets [B, K] as `mixing.blends`
    says.

    A pair of which one slot is bad (weight 0) stays as it is.
    """
    partner = torch.arange(len(images), device=images.device) ^ 1
    usable = (weights * weights[partner] > 0)[:, None]
    neutral = torch.arange(6, device=images.device) < 2  # both shares 1, an empty box; copies nothing
    pixel_share, label_share, *box = torch.where(usable, blends, neutral.float()).unbind(1)
    top, bottom, left, right = (edge[:, None] for edge in box)
    at = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)  # [B, S]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # [B, 1, S, S]
    pixel_share = pixel_share[:, None, None, None]
    mixed = torch.where(inside, images[partner], pixel_share * images + (1 - pixel_share) * images[partner])
    label_share = label_share[:, None]
    return mixed, label_share * targets + (1 - label_share) * targets[partner]
