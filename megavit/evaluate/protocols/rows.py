"""How a protocol goes over the training features: each rank its own share, in chunks, again and again.

Letters: n images, m rows of a chunk, D width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megavit.evaluate.features import Features, Piece

_HELD_BYTES = 2 << 30  # of main memory, for features that are gone over many times
_CHUNK_NUMBERS = 1 << 22  # float64 numbers of a chunk and of what is computed from it


class Share:
    """The rows that this rank works on: its data-parallel rows, divided once more within its TP group.

    So all ranks have different rows, and sums are over the world. They are kept on the mesh's device if they
    take less than 2 GiB (on a GPU: half of its free memory); otherwise each pass reads the features again.

    Args:
        features: of the whole set.
        rows: the only rows that are wanted, None for all.
    """

    def __init__(self, features: Features, rows: np.ndarray | None = None):
        self.features, self.mesh = features, features.mesh
        self._wanted = ~features.bad
        if rows is not None:
            self._wanted = np.zeros_like(features.bad)
            self._wanted[rows] = True
        self._held = self._hold()

    def chunks(self, numbers_per_row: int) -> Iterator[Piece]:
        """The rows, as many at a time as take a bounded amount of memory if each needs so many numbers."""
        size = max(1, _CHUNK_NUMBERS // numbers_per_row)
        for piece in self._read() if self._held is None else [self._held]:
            for start in range(0, len(piece.rows), size):
                chunk = slice(start, start + size)
                yield Piece(piece.rows[chunk], piece.values[chunk])

    def _read(self) -> Iterator[Piece]:
        for rows, values in self.features.mine():
            bounds = len(rows) * np.arange(self.mesh.tp_size + 1) // self.mesh.tp_size
            part = slice(bounds[self.mesh.tp_rank], bounds[self.mesh.tp_rank + 1])
            rows, values = rows[part], values[part]
            wanted = self._wanted[rows]
            if wanted.all():
                yield Piece(rows, values)
            else:
                yield Piece(rows[wanted], values[torch.from_numpy(wanted).to(values.device)])

    def _hold(self) -> Piece | None:
        budget, device = _HELD_BYTES, self.mesh.device
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        pieces = [Piece(np.zeros(0, np.int64), torch.zeros(0, self.features.dim, device=device))]
        for piece in self._read():
            budget -= piece.values.nbytes
            if budget < 0:
                return None
            pieces.append(piece)
        return Piece(np.concatenate([p.rows for p in pieces]), torch.cat([p.values for p in pieces]))


def single_labels(train: Features) -> np.ndarray:
    """The class of each image, int64 [n]. ValueError if an image that can be used has none or several."""
    labels, images = train.labels, train.set
    if not len(train.usable):
        raise ValueError(f"{images.name}: none of {len(images)} images could be read")
    filled = (labels >= 0).sum(1)[train.usable]
    if images.right != "one" or (filled != 1).any():
        raise ValueError(
            f"{images.name}: {int((filled != 1).sum())} of {len(filled)} images have no label or several; "
            f"kNN, few-shot and linear probes are trained on sets with one class an image"
        )
    return labels.max(1)


def held_out_tenth(train: Features, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The usable rows of a training set, divided: nine tenths to fit on, a tenth to choose by. Both sorted.

    Each class gives a tenth of its images, rounded up or down so that the total is a tenth as well. It
    depends on the labels, the bad images and the seed only. ValueError with fewer than ten images.
    """
    if len(train.usable) < 10:
        raise ValueError(f"{train.set.name}: a tenth of {len(train.usable)} images is none; it takes 10")
    shuffled = np.random.default_rng(seed).permutation(train.usable)
    by_class = shuffled[np.argsort(single_labels(train)[shuffled], kind="stable")]
    held = np.arange(len(by_class)) % 10 == 9
    return np.sort(by_class[~held]), np.sort(by_class[held])
