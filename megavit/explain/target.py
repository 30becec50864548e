"""What a map is to explain: a class's score, or how far one class is ahead of another; and how pixels and
patches of an image belong together.

Letters: B images, C channels, H height, W width, h rows and w columns of patches, P patch side, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from megavit.model.vit import MegaVit
from megavit.tasks.config import Loss

# A value for all pixels (-1 is black), or a tensor that broadcasts to [B, C, H, W].
Baseline = float | Tensor
BLACK = -1.0


class Target(NamedTuple):
    """The class of each image whose score is explained, int64 [B]; with `against`, why it and not that
    one."""

    classes: Tensor
    against: Tensor | None = None

    def score(self, logits: Tensor) -> Tensor:
        """[B, K] -> [B]: the class's logit, less that of the class that it is held against."""
        mine = logits.gather(1, self.classes[:, None])[:, 0]
        return mine if self.against is None else mine - logits.gather(1, self.against[:, None])[:, 0]

    def probability(self, logits: Tensor, loss: Loss) -> Tensor:
        """[B, K] -> [B]: of the class, in a model that was trained with this loss; with `against`, of the
        class if it must be one of the two."""
        if self.against is not None or loss == "sigmoid":
            return self.score(logits).sigmoid()
        return logits.softmax(1).gather(1, self.classes[:, None])[:, 0]

    def repeated(self, times: int) -> Target:
        """That of the images `times` over, [times * B]."""
        return Target(*(None if ids is None else ids.repeat(times) for ids in self))  # type: ignore[arg-type]


def check(model: MegaVit, images: Tensor) -> Tensor:
    """The images [B, C, H, W] in the model's dtype. Raises ValueError for images that do not fit, and for a
    model that has no classes, or drops activations at random."""
    images = images.to(model.dtype)
    model.embed.check(images)
    if model.head is None:
        raise ValueError("the model has num_classes=0, so there is no score to explain; load one with a head")
    if model.training:
        raise ValueError("the model is in training mode, in which maps are random; call model.eval() first")
    return images


def patch_sums(model: MegaVit, values: Tensor) -> Tensor:
    """Sums over each patch: [B, C, H, W] -> [B, h, w], float32 at least."""
    side = model.embed.patch_size
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return reduce(values, "b c (h p) (w q) -> b h w", "sum", p=side, q=side)


def replace(model: MegaVit, images: Tensor, patches: Tensor, by: Baseline) -> Tensor:
    """The images [B, C, H, W], with `by` where `patches`, bool [B, h, w], is true."""
    side = model.embed.patch_size
    pixels = patches.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    return torch.where(pixels, torch.as_tensor(by, dtype=images.dtype, device=images.device), images)
