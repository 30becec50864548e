"""Which box of which logical tensor a rank's shard is.

The logical tensors are the parameters of the `tp_size == 1` model. A shard is a slice along one dim, or, for
a fused weight, one equal slice of each of its parts (q, k, v), one after the other. Weights, exports and
checkpoints all speak of logical tensors; this file is the only place that knows how they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`length` entries along the sharded dim: at `start` of the logical tensor, at `local_start` of the
    shard."""

    start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Logical `shape`, and how it is cut over the TP ranks: along `dim` (None: replicated), each of `parts`
    by itself.

    A part whose length is no multiple of tp_size is padded with zeros on the last ranks (only the classifier
    uses that).
    """

    shape: tuple[int, ...]
    dim: int | None = None
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dim is not None:
            object.__setattr__(self, "parts", self.parts or (self.shape[self.dim],))
            assert sum(self.parts) == self.shape[self.dim], (self.parts, self.shape)

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        local = list(self.shape)
        local[self.dim] = sum(-(-part // tp_size) for part in self.parts)
        return tuple(local)

    def pieces(self, tp_rank: int, tp_size: int) -> list[Piece]:
        """This rank's pieces along `dim`, one a part; padding is left out. Empty for a replicated tensor."""
        found, offset, local_offset = [], 0, 0
        for part in self.parts:
            share = -(-part // tp_size)
            start = min(tp_rank * share, part)
            length = min(start + share, part) - start
            found.append(Piece(offset + start, local_offset, length))
            offset, local_offset = offset + part, local_offset + share
        return found

    def take(self, logical: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """The shard of `logical` that rank `tp_rank` holds; a copy unless replicated."""
        if self.dim is None:
            return logical
        local = logical.new_zeros(self.local_shape(tp_size))
        for piece in self.pieces(tp_rank, tp_size):
            source = logical.narrow(self.dim, piece.start, piece.length)
            local.narrow(self.dim, piece.local_start, piece.length).copy_(source)
        return local

    def join(self, shards: list[Tensor]) -> Tensor:
        """The logical tensor from all ranks' shards, in rank order; the inverse of `take`."""
        if self.dim is None:
            return shards[0]
        logical = shards[0].new_empty(self.shape)
        for tp_rank, shard in enumerate(shards):
            for piece in self.pieces(tp_rank, len(shards)):
                source = shard.narrow(self.dim, piece.local_start, piece.length)
                logical.narrow(self.dim, piece.start, piece.length).copy_(source)
        return logical


def layout_of(parameter: torch.nn.Parameter) -> Layout:
    """The layout that `Initializer` attached to a parameter."""
    layout = getattr(parameter, "tp_layout", None)
    assert isinstance(layout, Layout), "parameters are made by megavit.parallel.init.Initializer"
    return layout
