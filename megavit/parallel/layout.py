"""Which box of which logical tensor a rank's shard is.

The logical tensors are the parameters of the `tp_size == 1` model. A shard is a slice along one dim, or, for
a fused weight, one equal slice of each of its parts (q, k, v), one after the other. Weights, exports and
checkpoints all speak of logical tensors; this file is the only place that knows how they are cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """`length` entries along the sharded dim: at `start` of the logical tensor, at `local_start` of the
    shard."""

    start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class Box:
    """A rectangle of a logical tensor seen as a matrix [shape[0], rest], which a flat slice of a shard holds
    row by row, without gaps, from its element `offset` on."""

    row: int
    column: int
    rows: int
    columns: int
    offset: int


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

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The logical shape as rows and columns, the view that boxes speak of."""
        return self.shape[0], math.prod(self.shape[1:])

    def boxes(self, tp_rank: int, tp_size: int, start: int, stop: int) -> list[Box]:
        """What elements [start, stop) of the flattened shard are of the logical tensor; padding is left out.

        ZeRO cuts flattened shards anywhere, so a slice is at most the rest of a row, whole rows and part of a
        row, of each part. Boxes of all ranks tile the logical tensor if their slices tile the shards.
        """
        rows, columns = self.matrix_shape
        found = []
        if self.dim == 1:
            (piece,) = self.pieces(tp_rank, tp_size)
            assert piece.length * tp_size == self.shape[1] and len(self.shape) == 2, (self, tp_size)
            for row, column, height, width, offset in _cut(start, stop, piece.length):
                found.append(Box(row, column + piece.start, height, width, offset))
            return found
        for piece in self.pieces(tp_rank, tp_size) if self.dim == 0 else [Piece(0, 0, rows)]:
            first = piece.local_start * columns
            low, high = max(start, first), min(stop, first + piece.length * columns)
            shift = piece.start - piece.local_start
            for row, column, height, width, offset in _cut(low, high, columns):
                found.append(Box(row + shift, column, height, width, offset + low - start))
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


def _cut(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Elements [start, stop) of a row-major matrix with rows of `width`, as rectangles (row, column, rows,
    columns, offset from start)."""
    at = start
    while at < stop:
        row, column = divmod(at, width)
        if column or stop - at < width:
            height, columns = 1, min(width - column, stop - at)
        else:
            height, columns = (stop - at) // width, width
        yield row, column, height, columns, at - start
        at += height * columns


def layout_of(parameter: Tensor) -> Layout:
    """The layout that `Initializer` attached to a parameter or statistic."""
    layout = getattr(parameter, "tp_layout", None)
    assert isinstance(layout, Layout), "parameters are made by megavit.parallel.init.Initializer"
    return layout
