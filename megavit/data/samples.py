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
    picture, which decides the geometry of the others."""

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
        self._fields = tuple(fields)
        self.record: Callable[[str, int], None] | None = None  # told of each sample before it is read

    def batch(
        self, shards: Sequence[int], indexes: Sequence[int], padded: int, random: np.ndarray | None
    ) -> Batch:
        """The samples' batch of `padded` rows, augmented by the uniforms `random` [n, NUM_RANDOM], or, if
        None, as for evaluation. `flips` and `blends` are left to the caller."""
        rows = self.empty(padded)
        weights = np.zeros(padded, np.float32)
        bad = []
        self.reader.fetch(set(shards))
        for number, (shard, index) in enumerate(zip(shards, indexes, strict=True)):
            row = {name: values[number, ...] for name, values in rows.items()}
            try:
                self.load(shard, index, row, None if random is None else random[number])
                weights[number] = 1.0
            except SampleError as error:
                for field in self._fields:
                    row[field.name][...] = field.fill
                bad.append(error.bad)
        return Batch(
            {name: torch.from_numpy(values) for name, values in rows.items()},
            torch.from_numpy(weights),
            flips=torch.zeros(0, dtype=torch.bool),
            blends=None,
            bad=bad,
        )

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """For each field [count, *shape], filled."""
        return {field.name: field.empty(count) for field in self._fields}

    def load(self, shard: int, index: int, row: dict[str, np.ndarray], u: np.ndarray | None) -> None:
        """Decode a sample into `row`, one array [*shape] a field, augmented by the uniforms `u` [NUM_RANDOM],
        or, if None, as for evaluation. SampleError if it cannot be used; the row is then undefined."""
        if self.record:
            self.record(self.reader.manifest.urls[shard], index)
        members = self.reader.members(shard, index)
        try:
            chosen = [_choose(field, members) for field in self._fields]
            wanted = dict.fromkeys(chosen)  # each once, in order
            found = dict(zip(wanted, self.reader.read(shard, index, wanted), strict=True))
            self._decode([(member.extension, found[member]) for member in chosen], row, u)
        except SampleError:
            raise
        except ValueError as error:
            raise self.reader.error(shard, index, str(error)) from error
        except Exception as error:  # one sample must not end the run, whatever a library makes of its bytes
            reason = f"it cannot be used: {type(error).__name__}: {error}".removesuffix(": ")
            raise self.reader.error(shard, index, reason) from error

    def _decode(
        self, members: list[tuple[str, bytes]], row: dict[str, np.ndarray], u: np.ndarray | None
    ) -> None:
        """Decode the fields from the (extension, bytes) of their members."""
        picture = self.picture
        extension, data = members[self._fields.index(picture)]
        choose = partial(decide, config=self.config, u=u)
        try:
            geometry = picture.decode_first(data, extension, choose, row[picture.name])
        except DecodeError as error:
            raise ValueError(f"it cannot be decoded: {error}") from error
        for field, (extension, data) in zip(self._fields, members, strict=True):
            if field is picture:
                continue
            try:
                field.decode(data, extension, geometry, row[field.name])
            except DecodeError as error:
                raise ValueError(f"its {extension} cannot be decoded: {error}") from error


def _choose(field: Field, members: dict[str, Member]) -> Member:
    """The member that holds a field."""
    for name in field.extensions:
        if name in members:
            return members[name]
    raise ValueError(f"it has {', '.join(members)} but no {' or '.join(field.extensions)}")
