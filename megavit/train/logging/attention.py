"""How large the scores of attention are: QK norm keeps them from growing until the softmax of large models
saturates (arXiv 2302.05442, section 2).

Letters: b micro-batch, H/tp heads of this rank, N tokens, K head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megavit.model.vit import MegaVit
from megavit.parallel.collectives import max_over_world
from megavit.train.engine import Engine


def learns_attention(module: Any) -> bool:
    """Whether a task's module has a `trunk` whose scores change: one that is not frozen."""
    trunk = getattr(module, "trunk", None)
    return isinstance(trunk, MegaVit) and any(weight.requires_grad for weight in trunk.parameters())


@torch.no_grad()
def max_attention(engine: Engine, inputs: Any) -> Tensor:
    """The largest |q . k| / sqrt(K) over the blocks and heads of the task's trunk and over all ranks'
    micro-batches `inputs`: [] on the device, infinite if one of them is not a number.

    Costs a forward pass in evaluation mode, in which compiled blocks run uncompiled, and holds the matrices
    of one image. Collective over the world.
    """
    largest = engine.call(_observe_largest, inputs)
    return max_over_world(engine.mesh, largest.nan_to_num(nan=torch.inf))


def _observe_largest(module: Any, inputs: Any) -> Tensor:
    observer = _Largest()
    with module.trunk.observe(observer):
        module(inputs)
    return torch.stack(observer.found).max()


class _Largest:
    """An observer that keeps a number of each block."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def queries_keys(self, layer: int, q: Tensor, k: Tensor) -> None:
        # float32, as inside of the fused kernels; image by image: [H/tp, N, N] instead of [b, H/tp, N, N].
        of_images = [
            (q_one.float() @ k_one.float().mT).abs().max() for q_one, k_one in zip(q, k, strict=True)
        ]
        self.found.append(torch.stack(of_images).max() * q.shape[-1] ** -0.5)
