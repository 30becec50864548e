"""Frozen weights, which checkpoints do not hold: a checkpoint says where they come from, and they are read
from there again. That is an export, by folder and digest, and for what it lacks the run's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from megavit.model.config import ModelConfig
from megavit.model.embed import POSITION, resize_position
from megavit.model.exported import HEAD, export_folder, open_export, stored_shapes
from megavit.model.vit import WEIGHTS_FILE
from megavit.parallel.layout import Box, Layout
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.manifest import WEIGHT, CheckpointError, Frozen

_CHUNK = 64 << 20  # bytes that one rank reads at a time for the digest


def export_digest(folder: str | Path, mesh: Mesh | None = None) -> str:
    """A digest of an export's weights: of the checksums of their file's pieces, which the ranks share out.
    Reads every byte once. Collective over the world. ValueError if they cannot be read."""
    mesh = mesh or Mesh.single()
    path = export_folder(Path(folder)) / WEIGHTS_FILE
    mine: dict[int, int] = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            for number in range(mesh.global_rank, -(-size // _CHUNK), mesh.world_size):
                file.seek(number * _CHUNK)
                mine[number] = crc32(file.read(_CHUNK))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    checksums = {number: value for some in mesh.gather(mine) for number, value in some.items()}
    text = f"{size} " + " ".join(f"{checksums[number]:08x}" for number in sorted(checksums))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def check_digest(frozen: Frozen, folder: str, mesh: Mesh | None = None) -> None:
    """CheckpointError unless the export in `folder` is the one that the run's frozen weights came from.
    Collective over the world."""
    try:
        found = export_digest(folder, mesh)
    except ValueError as error:
        raise CheckpointError(
            f"the frozen weights of this run are those of the export {folder}, but {error}; if it was moved, "
            f"name its place with --init_from"
        ) from error
    if found != frozen.digest:
        raise CheckpointError(
            f"the frozen weights of this run are those of an export with the digest {frozen.digest}, but "
            f"{folder} has the digest {found} now: it was written again; restore it, or name a copy with "
            f"--init_from"
        )


class ExportedWeights:
    """The weights of an export, as a model of `layouts` (by logical name) takes them: its own classifier may
    have another size, and keeps its initial weights; the position embedding is resized to its grid.

    `names` are those that the export gives.
    """

    def __init__(self, folder: Path, file: Any, layouts: dict[str, Layout], config: ModelConfig):
        self._file, self._shapes = file, stored_shapes(file)
        shapes = self._shapes
        self.other_head = [
            name for name in HEAD if name in layouts and shapes.get(name) != layouts[name].shape
        ]
        self.names = [name for name in layouts if name in shapes and name not in self.other_head]
        self.unused = sorted(shapes.keys() - layouts.keys())
        self.resized = ""
        self._position = None
        for name in self.names:
            shape, needed = shapes[name], layouts[name].shape
            if shape == needed:
                continue
            if name != POSITION or shape[1] != needed[1]:
                raise ValueError(f"--init_from {folder}: {name} has shape {shape}, this model needs {needed}")
            self._position = resize_position(file.get_tensor(name), (config.grid_size, config.grid_size))
            self.resized = f"position embedding resized from {shape[0]} to {needed[0]} tokens"

    def read(self, name: str, boxes: Sequence[Box], out: dict[str, np.ndarray]) -> None:
        """Fill the flat slice that `boxes` describe; reads no more than they need."""
        stored = self._file.get_slice(name)
        if name == POSITION and self._position is not None:
            stored = self._position
        two = len(self._shapes[name]) == 2
        for box in boxes:
            rows, columns = slice(box.row, box.row + box.rows), slice(box.column, box.column + box.columns)
            part = stored[rows, columns] if two else stored[rows]
            out[WEIGHT][box.offset : box.offset + part.numel()] = part.reshape(-1).float().numpy()


@contextmanager
def exported_weights(
    folder: str | Path, layouts: dict[str, Layout], config: ModelConfig
) -> Iterator[ExportedWeights]:
    """An export, opened for a model of `layouts`. ValueError for a folder that is no export or a damaged one,
    and for a difference in shape that cannot be bridged."""
    with open_export(Path(folder)) as (_, file):
        yield ExportedWeights(Path(folder), file, layouts, config)


def frozen_of(
    folder: str, layouts: dict[str, Layout], config: ModelConfig, mesh: Mesh | None = None
) -> Frozen:
    """Where the frozen parameters `layouts` of a new run come from, that starts from the export `folder`, or,
    if that is empty, from its seed. Collective over the world."""
    if not (folder and layouts):
        return Frozen(initial=layouts)
    with exported_weights(folder, layouts, config) as weights:
        exported = {name: layouts[name] for name in weights.names}
    initial = {name: layout for name, layout in layouts.items() if name not in exported}
    return Frozen(str(Path(folder).absolute()), export_digest(folder, mesh), exported, initial)


Read = Callable[[str, list[Box], dict[str, np.ndarray]], None]


@contextmanager
def frozen_reader(frozen: Frozen, folder: str, config: ModelConfig, initial: Read) -> Iterator[Read]:
    """What reads frozen weights by name: from the export in `folder`, and by `initial` what is the seed's."""
    if not frozen.exported:
        yield initial
        return
    with exported_weights(folder, frozen.exported, config) as weights:
        given: Collection[str] = set(weights.names)

        def read(name: str, boxes: list[Box], out: dict[str, np.ndarray]) -> None:
            (weights.read if name in given else initial)(name, boxes, out)

        yield read
