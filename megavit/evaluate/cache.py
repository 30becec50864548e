"""The feature cache: what a model makes of a set, on disk, computed once.

A folder for each (weights, transform, images, precision), named by their digest, in it one for each layer,
and there pieces of so many rows each, `00000012.safetensors`, whose bounds depend on the set alone. Whatever
computes a piece writes it whole and renames it, so a pass that was killed goes on with the missing pieces, at
any number of ranks. Pieces are mapped into memory when they are read, one at a time.

Letters: n images, m rows of a piece, D width of the features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavit.data.loader import Share
from megavit.evaluate.features import Features, Piece
from megavit.evaluate.images import Bad, Loaded, Transform, load_batches
from megavit.evaluate.model import FrozenModel
from megavit.evaluate.sets.image_set import ImageSet, digest_of
from megavit.parallel.collectives import gather_from_tp, sum_over_world
from megavit.parallel.mesh import Mesh

CACHE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FORMAT = 1
_KEY_FILE = "key.json"
_MIN_PIECE, _MAX_PIECE = 64, 1024  # rows
_DISK_SHARE = 0.98  # of the free space that a pass may fill


def default_folder() -> Path:
    """Where features are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megavit" / "features"


@dataclass(frozen=True)
class PassSettings:
    """How the features of a set are computed.

    Args:
        folder: of the cache; all ranks must see it.
        dtype: in which features are kept, float32 or float16 (half the size, 3 digits).
        batch_size: images that go through the model together, on one rank or TP group.
        workers: decoding processes a rank; None chooses.
    """

    folder: Path
    dtype: str = "float32"
    batch_size: int = 64
    workers: int | None = None


class Pass:
    """The features of one set by one model: computes what is missing in the cache, and gives what is there.

    Collective over the world, as are its methods. `say` is told, on the main rank, what is about to be done
    (the size before anything is written), and `progress` the number of images that are done on this rank.
    """

    def __init__(
        self,
        model: FrozenModel,
        images: ImageSet,
        settings: PassSettings,
        say: Callable[[str], None] = lambda text: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.model, self.images, self.settings, self.mesh = model, images, settings, model.mesh
        self.transform = Transform(model.preprocessing, images.adjust)
        self._say, self._progress = say, progress
        self._pieces = _bounds(len(images))
        self._batch_size = settings.batch_size
        key = digest_of(_FORMAT, model.digest, self.transform.digest, images.digest, settings.dtype)
        self.folder = settings.folder / key
        self.bad: list[Bad] = []

    def features(self, layers: Sequence[str]) -> dict[str, Features]:
        """Of each layer. Images that cannot be read are in `bad` then."""
        missing = self.mesh.on_main(lambda: self._missing(layers))
        if missing:
            self._compute(missing)
        found = self.mesh.on_main(lambda: _Files(self.folder, self._pieces).read_bad(layers))
        widths, bad = found
        self.bad = [Bad(int(row), reason) for row, reason in sorted(bad.items())]
        flags = np.zeros(len(self.images), bool)
        flags[[row for row, _ in self.bad]] = True
        files = _Files(self.folder, self._pieces)
        self._check_shared(layers)
        return {
            layer: CachedFeatures(self.images, layer, widths[layer], flags, self.mesh, files)
            for layer in layers
        }

    def _missing(self, layers: Sequence[str]) -> list[tuple[int, list[str]]]:
        """The pieces that are not in the cache, each with the layers that it lacks."""
        files = _Files(self.folder, self._pieces)
        lacking = {layer: files.missing(layer) for layer in layers}
        numbers = sorted(set().union(*lacking.values()))
        return [(piece, [layer for layer in layers if piece in lacking[layer]]) for piece in numbers]

    def _compute(self, missing: list[tuple[int, list[str]]]) -> None:
        mine = missing[self.mesh.dp_rank :: self.mesh.dp_size]
        batches, owners = [], []
        for piece, layers in mine:
            start, stop = self._pieces[piece]
            for first in range(start, stop, self._batch_size):
                batches.append(np.arange(first, min(first + self._batch_size, stop)))
                owners.append((piece, layers, batches[-1][-1] + 1 == stop))
        share = Share(tp_rank=self.mesh.tp_rank, tp_size=self.mesh.tp_size, local_size=self.mesh.local_size)
        self._open(missing)
        loaded = load_batches(self.images, self.transform, batches, share, self.settings.workers)
        error = self._fill(zip(loaded, owners, strict=True), sum(map(len, batches)))
        # The others may still be at work: nobody reads what is not there yet, and all learn what went wrong.
        if errors := [text for text in self.mesh.gather(error) if text]:
            raise ValueError(errors[0])

    def _fill(self, batches: Iterator[tuple[Loaded, tuple[int, list[str], bool]]], total: int) -> str:
        """Compute and write this rank's pieces, up to an error: what it was, the same on the ranks of a TP
        group."""
        done = 0
        parts: list[tuple[Loaded, Tensor, dict[str, Tensor]]] = []
        for batch, (piece, layers, is_last) in batches:
            pixels, failed = (
                gather_from_tp(self.mesh, part.to(self.mesh.device, non_blocking=True), 0)[: len(batch.rows)]
                for part in (batch.pixels, batch.failed)
            )
            try:
                found = self._forward(pixels, layers)
            except ValueError as caught:
                return str(caught)
            parts.append((batch, failed.cpu(), {name: value.cpu() for name, value in found.items()}))
            if is_last:
                if error := self._write(piece, layers, parts):
                    return error
                parts = []
            done += len(batch.rows)
            self._progress(done, total)
        return ""

    def _forward(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """The features of a batch. If the device has no memory for it, its halves, and so from then on."""
        while True:
            try:
                parts = [self.model.features(some, layers) for some in pixels.split(self._batch_size)]
                return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
            except torch.OutOfMemoryError as error:
                text = (
                    f"the device has no memory for {self._batch_size} images at a time: lower --batch_size, "
                    f"or raise --tensor_parallel_size"
                )
                # With the others of a TP group waiting in a collective there is no second attempt, and no
                # way to tell them: this process ends.
                if self.mesh.tp_size > 1:
                    raise RuntimeError(text) from error
                if self._batch_size == 1:
                    raise ValueError(text) from error
                self._batch_size = -(-self._batch_size // 2)
                self._say(f"no memory for so many images at a time: going on with {self._batch_size}")
            torch.cuda.empty_cache()

    def _open(self, missing: list[tuple[int, list[str]]]) -> None:
        """Announce and check the size of what will be written, and make the folder."""
        widths = self._widths(sorted({layer for _, layers in missing for layer in layers}))
        rows = {piece: stop - start for piece, (start, stop) in enumerate(self._pieces)}
        bytes_each = CACHE_DTYPES[self.settings.dtype].itemsize
        size = sum(rows[piece] * widths[layer] * bytes_each for piece, layers in missing for layer in layers)
        whole = sum(rows[piece] for piece, _ in missing)
        self.mesh.on_main(lambda: self._make_folder(size, whole))

    def _make_folder(self, size: int, num_images: int) -> None:
        left = (
            "" if num_images == len(self.images) else f" of the {len(self.images):,} (the others are there)"
        )
        adjust = self.images.adjust
        corrupted = f" ({adjust.corruption} {adjust.severity})" if adjust.corruption else ""
        self._say(
            f"{self.images.name} {self.images.split}{corrupted}: features of {num_images:,} images{left}, "
            f"{_size(size)} in {self.folder}"
        )
        fields = {
            "format": _FORMAT,
            "model": self.model.name,
            "model_digest": self.model.digest,
            "transform": self.transform.text,
            "transform_digest": self.transform.digest,
            "data": f"{self.images.name} {self.images.split}",
            "data_digest": self.images.digest,
            "images": len(self.images),
            "dtype": self.settings.dtype,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _KEY_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        except OSError as error:
            raise ValueError(
                f"the feature cache {self.settings.folder} cannot be written: {error.strerror}; name another "
                f"folder with --cache_dir"
            ) from error
        free = shutil.disk_usage(self.folder).free
        if size > free * _DISK_SHARE:
            raise ValueError(
                f"the features need {_size(size)}, but {self.folder} has {_size(free)} left; name another "
                f"folder with --cache_dir, halve them with --cache_dtype float16, or ask for fewer layers"
            )

    def _widths(self, layers: Sequence[str]) -> dict[str, int]:
        """Of each layer, from a blank image. Collective."""
        used = self.model.preprocessing
        blank = torch.zeros(1, used.image_size, used.image_size, used.channels, dtype=torch.uint8)
        return {name: value.shape[1] for name, value in self.model.features(blank, layers).items()}

    def _write(
        self, piece: int, layers: Sequence[str], parts: list[tuple[Loaded, Tensor, dict[str, Tensor]]]
    ) -> str:
        """Write a piece of each layer. The ranks of a TP group have the same rows; the first one writes.
        Returns why it could not, on all of them."""
        failed = torch.cat([part for _, part, _ in parts])
        mine = [bad for loaded, _, _ in parts for bad in loaded.bad]
        # What the others of the group have seen of bad images comes as flags only, unless there are any.
        bad = mine if not failed.any() else self._bad_of_group(mine)
        error = ""
        if not self.mesh.tp_rank:
            metadata = {"bad": json.dumps({str(row): reason for row, reason in bad})}
            try:
                for layer in layers:
                    values = torch.cat([found[layer] for _, _, found in parts])
                    values[failed.bool()] = 0
                    self._write_layer(layer, piece, values, metadata)
            except ValueError as caught:
                error = str(caught)
        return next(filter(None, self.mesh.gather_over_tp(error)), "")

    def _write_layer(self, layer: str, piece: int, values: Tensor, metadata: dict[str, str]) -> None:
        kept = values.to(CACHE_DTYPES[self.settings.dtype])
        if not kept.isfinite().all():
            self._refuse(layer, values)
        path = _Files(self.folder, self._pieces).path(layer, piece)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({"values": kept.contiguous()}, partial, metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{path} cannot be written: {error}; name another folder with --cache_dir"
            ) from error

    def _refuse(self, layer: str, values: Tensor) -> NoReturn:
        if values.isfinite().all():
            raise ValueError(
                f"features of {layer} are as large as {values.abs().max():.4g}, which float16 does not hold: "
                f"use --cache_dtype float32"
            )
        raise ValueError(
            f"features of {layer} are not finite: the weights of {self.model.name} are damaged, or the model "
            f"needs --dtype float32"
        )

    def _bad_of_group(self, mine: list[Bad]) -> list[Bad]:
        """The bad images that the ranks of the TP group have found, each in its part of the batches."""
        return [Bad(*bad) for some in self.mesh.gather_over_tp(mine) for bad in some]

    def _check_shared(self, layers: Sequence[str]) -> None:
        """ValueError on every rank unless all of them see the pieces."""
        files = _Files(self.folder, self._pieces)
        blind = torch.zeros(self.mesh.world_size)
        blind[self.mesh.global_rank] = any(files.missing(layer) for layer in layers)
        ranks = sum_over_world(self.mesh, blind.to(self.mesh.device)).nonzero().flatten().tolist()
        if ranks:
            raise ValueError(
                f"rank(s) {', '.join(map(str, ranks))} do not see all features in {self.folder}: name a "
                f"folder with --cache_dir that all hosts share"
            )


class CachedFeatures(Features):
    """The features of a set in the cache."""

    def __init__(self, images: ImageSet, layer: str, dim: int, bad: np.ndarray, mesh: Mesh, files: _Files):
        super().__init__(images, layer, dim, bad, mesh)
        self._files = files

    def mine(self) -> Iterator[Piece]:
        return self._read(range(self.mesh.dp_rank, len(self._files.pieces), self.mesh.dp_size))

    def everywhere(self) -> Iterator[Piece]:
        return self._read(range(len(self._files.pieces)))

    def take(self, rows: np.ndarray) -> Tensor:
        # Every rank reads: no communication.
        out = torch.zeros(len(rows), self.dim, device=self.mesh.device)
        starts = np.array([start for start, _ in self._files.pieces])
        pieces = np.searchsorted(starts, rows, side="right") - 1
        for piece in np.unique(pieces):
            at = np.flatnonzero(pieces == piece)
            values = self._files.values(self.layer, int(piece))
            chosen = values[torch.from_numpy(rows[at] - starts[piece])]
            out[torch.from_numpy(at)] = chosen.float().to(self.mesh.device)
        return out

    def _read(self, pieces: Sequence[int]) -> Iterator[Piece]:
        for number in pieces:
            start, stop = self._files.pieces[number]
            usable = np.flatnonzero(~self.bad[start:stop])
            if len(usable):
                values = self._files.values(self.layer, number)[torch.from_numpy(usable)]
                yield Piece(usable + start, values.to(self.mesh.device).float())


class _Files:
    """The pieces of a set in a folder of the cache; `pieces` are the bounds of their rows."""

    def __init__(self, folder: Path, pieces: list[tuple[int, int]]):
        self._folder, self.pieces = folder, pieces

    def path(self, layer: str, piece: int) -> Path:
        return self._folder / layer / f"{piece:08d}.safetensors"

    def missing(self, layer: str) -> set[int]:
        """The numbers of the pieces that are not there, or damaged."""
        return {number for number in range(len(self.pieces)) if not self._is_whole(layer, number)}

    def values(self, layer: str, piece: int) -> Tensor:
        """[m, D] in the cache's dtype, mapped."""
        with safe_open(self.path(layer, piece), framework="pt") as file:
            found: Tensor = file.get_tensor("values")
            return found

    def read_bad(self, layers: Sequence[str]) -> tuple[dict[str, int], dict[int, str]]:
        """The width of each layer, and the bad images of all: their numbers and why they are bad."""
        widths: dict[str, int] = {}
        bad: dict[int, str] = {}
        for layer in layers:
            for piece in range(len(self.pieces)):
                with safe_open(self.path(layer, piece), framework="pt") as file:
                    found: dict[str, Any] = json.loads(file.metadata()["bad"])
                    widths[layer] = file.get_slice("values").get_shape()[1]
                bad |= {int(row): reason for row, reason in found.items()}
        return widths, bad

    def _is_whole(self, layer: str, piece: int) -> bool:
        start, stop = self.pieces[piece]
        try:
            with safe_open(self.path(layer, piece), framework="pt") as file:
                rows: int = file.get_slice("values").get_shape()[0]
                return rows == stop - start and "bad" in file.metadata()
        except (OSError, SafetensorError):  # none, or one that a crash of the host has left: made again
            return False


def _bounds(num_images: int) -> list[tuple[int, int]]:
    """The rows of each piece: a power of two that makes some 64 pieces of a set, within limits."""
    size = _MIN_PIECE
    while size < _MAX_PIECE and size * 64 < num_images:
        size *= 2
    return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
