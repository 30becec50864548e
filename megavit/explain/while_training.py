"""Maps of a model that is being trained, at whatever ZeRO stage and layout.

Letters: n images, C channels, S image side, h rows and w columns of patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavit.explain.pictures import laid_over
from megavit.explain.relevance import located
from megavit.explain.target import Target

METHOD = "located"


def explained(module: Any, images: Tensor) -> Tensor:
    """The images [n, C, S, S] in [-1, 1], float32 [n, 3, S, S] in [0, 1], each under the map of where the
    evidence for its likeliest class lies. `module` is that of a classification, see `Engine.call`."""
    trunk = module.trunk
    with torch.no_grad():
        best = trunk(images.to(trunk.dtype)).argmax(1)
    maps = located(trunk, images, Target(best)).cpu().numpy()  # [n, h, w]
    channels = 3 if images.shape[1] >= 3 else 1
    pixels = ((images[:, :channels].float() + 1) * 127.5).round().clamp(0, 255).byte()
    rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
    found = [laid_over(row, values, least_side=1) for row, values in zip(rows, maps, strict=True)]
    stacked = np.stack(found) if found else np.empty((0, *rows.shape[1:3], 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
