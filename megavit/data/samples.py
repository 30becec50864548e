"""Reading samples and decoding their fields into rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from megavit.data.bad import SampleError
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.fields import Batch, Field, Picture
from megavit.data.geometry import decide
from megavit.data.images import DecodeError
from megavit.data.index import Member
from megavit.data.manifest import Manifest
from megavit.data.reader import ShardReader


class Samples:
    """Decodes samples into rows of a batch. ValueError if two fields have the same name, or none is a
    picture or video, which decides the geometry of the others."""

    def __init__(
        self, manifest: Manifest, fields: Sequence[Field], config: DataConfig, cache: ShardCache | None = None
    ):
        names = [field.name for field in fields]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two fields of a sample are called {min(twice)!r}")
        pictures = [field for field in fields if isinstance(field, Picture)]
        if not pictures:
            raise ValueError(f"none of the fields {', '.join(names) or '(none)'} of a sample is a Picture")
        self.reader = ShardReader(manifest, cache)
        self.picture, self.config = pictures[0], config
        # The picture first: it decides the geometry.
        self._fields = sorted(fields, key=lambda field: field is not self.picture)
        self.record: Callable[[str, int], None] | None = None  # told of each sample before it is read

    def batch(
        self, shards: Sequence[int], indexes: Sequence[int], padded: int, random: np.ndarray | None
    ) -> Batch:
        """The samples' batch of `padded` rows, augmented by the uniforms `random` [n, NUM_RANDOM], or, if
        None, as for evaluation. `flips` and `blends` are left to the caller."""
        columns = self.empty(padded)
        weights = np.zeros(padded, np.float32)
        bad = []
        self.reader.fetch(set(shards))
        for number, (shard, index) in enumerate(zip(shards, indexes, strict=True)):
            row = [column[number, ...] for column in columns]
            try:
                self.load(shard, index, row, None if random is None else random[number])
                weights[number] = 1.0
            except SampleError as error:
                for field, values in zip(self._fields, row, strict=True):
                    values[...] = field.fill
                bad.append(error.bad)
        found = zip(self._fields, columns, strict=True)
        return Batch(
            {field.name: torch.from_numpy(values) for field, values in found},
            torch.from_numpy(weights),
            flips=torch.zeros(0, dtype=torch.bool),
            blends=None,
            bad=bad,
        )

    def empty(self, count: int) -> list[np.ndarray]:
        """For each field [count, *shape], filled."""
        return [field.empty(count) for field in self._fields]

    def load(self, shard: int, index: int, row: list[np.ndarray], u: np.ndarray | None) -> None:
        """Decode a sample into `row`, a row of each array of `empty`, augmented by the uniforms `u`
        [NUM_RANDOM], or, if None, as for evaluation. SampleError if it cannot be used; the row is then
        undefined."""
        if self.record:
            self.record(self.reader.manifest.urls[shard], index)
        members = self.reader.members(shard, index)
        try:
            chosen = [_choose(field, members) for field in self._fields]
            data = self._read(shard, index, [members[extension] for extension in dict.fromkeys(chosen)])
            self._decode(chosen, data, row, u)
        except SampleError:
            raise
        except ValueError as error:
            raise self.reader.error(shard, index, str(error)) from error
        except Exception as error:  # one sample must not end the run, whatever a library makes of its bytes
            reason = f"it cannot be used: {type(error).__name__}: {error}".removesuffix(": ")
            raise self.reader.error(shard, index, reason) from error

    def _read(self, shard: int, index: int, members: list[Member]) -> dict[str, bytes]:
        data = self.reader.read(shard, index, members)
        return {member.extension: found for member, found in zip(members, data, strict=True)}

    def _decode(
        self, chosen: list[str], data: dict[str, bytes], row: list[np.ndarray], u: np.ndarray | None
    ) -> None:
        """Decode each field from the bytes of the member that was chosen for it."""
        extension = chosen[0]
        choose = partial(decide, config=self.config, u=u)
        try:
            geometry = self.picture.decode_first(data[extension], extension, choose, row[0])
        except DecodeError as error:
            raise ValueError(f"it cannot be decoded: {error}") from error
        for field, extension, out in zip(self._fields[1:], chosen[1:], row[1:], strict=True):
            try:
                field.decode(data[extension], extension, geometry, out)
            except DecodeError as error:
                raise ValueError(f"its {extension} cannot be decoded: {error}") from error


def _choose(field: Field, members: dict[str, Member]) -> str:
    """The extension of the member that holds a field."""
    for extension in field.extensions:
        if extension in members:
            return extension
    raise ValueError(f"it has {', '.join(members)} but no {' or '.join(field.extensions)}")
