"""Frozen features of a data set, as the protocols see them: rows of numbers, shared out over the ranks.

Letters: n images, m rows of a piece, D width of the features.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.sets.image_set import ImageSet
from megavit.parallel.collectives import sum_over_dp
from megavit.parallel.mesh import Mesh


class Piece(NamedTuple):
    """Some of the usable rows of a set: their numbers, int64 [m], and values, float32 [m, D]."""

    rows: np.ndarray
    values: Tensor


class Features(ABC):
    """One kind of feature (`layer`) of every image of a set.

    The data-parallel ranks share out the rows in pieces; the ranks of a TP group have the same ones. Images
    that could not be read are in no piece. What is called collective is called by all ranks, in one order.
    """

    def __init__(self, images: ImageSet, layer: str, dim: int, bad: np.ndarray, mesh: Mesh):
        self.set, self.layer, self.dim, self.mesh = images, layer, dim, mesh
        self.bad = bad  # bool [n], the same on every rank

    @cached_property
    def usable(self) -> np.ndarray:
        """The numbers of the images that have features, int64."""
        return np.flatnonzero(~self.bad)

    @property
    def labels(self) -> np.ndarray:
        """Of all images: int64 [n, M], see `ImageSet`."""
        return self.set.labels

    def labelled(self, images: ImageSet) -> Features:
        """The same features with the labels of another set that has the same images."""
        assert images.digest == self.set.digest, (images.name, self.set.name)
        found = copy.copy(self)
        found.set = images
        return found

    @abstractmethod
    def mine(self) -> Iterator[Piece]:
        """This rank's pieces, each row on one DP rank, on the mesh's device."""

    @abstractmethod
    def everywhere(self) -> Iterator[Piece]:
        """All pieces, in the order of the rows, on every rank. One piece is held at a time. Collective."""

    def take(self, rows: np.ndarray) -> Tensor:
        """The features of a few images, float32 [len(rows), D], on every rank; all must be usable.
        Collective: one all-reduce of the result."""
        place = {int(row): number for number, row in enumerate(rows)}
        out = torch.zeros(len(rows), self.dim, device=self.mesh.device)
        for piece in self.mine():
            chosen = [(place[row], i) for i, row in enumerate(piece.rows.tolist()) if row in place]
            if chosen:
                to, at = (
                    torch.tensor(numbers, device=self.mesh.device) for numbers in zip(*chosen, strict=True)
                )
                out[to] = piece.values[at]
        return sum_over_dp(self.mesh, out)


class MemoryFeatures(Features):
    """Features that this rank holds in memory: of a training run, where every rank has its own rows."""

    def __init__(
        self,
        images: ImageSet,
        layer: str,
        dim: int,
        bad: np.ndarray,
        mesh: Mesh,
        pieces: Sequence[Piece],
    ):
        super().__init__(images, layer, dim, bad, mesh)
        self._pieces = list(pieces)

    def mine(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def everywhere(self) -> Iterator[Piece]:
        for rows in np.array_split(self.usable, max(1, -(-len(self.usable) // 4096))):
            yield Piece(rows, self.take(rows))
