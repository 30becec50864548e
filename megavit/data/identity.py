"""Whether shards are still the ones that a run has read: members, keys, sizes and places always count, and
checksums where both sides know them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megavit.data.json_data import json_field, parse_json


class ShardRow(NamedTuple):
    """What makes a shard this one: its name without the folder, so that data may move, and what is in it.

    `digest` covers the checksums of its members where they are known, `content` never does.
    """

    name: str
    samples: int
    bytes: int
    content: str
    digest: str

    def is_same(self, other: ShardRow) -> bool:
        """Whether both are the same data, as far as both know."""
        return self[:3] == other[:3] and same_content(self[3:], other[3:])

    def __str__(self) -> str:
        return f"{self.name} ({self.samples:,} samples, {self.bytes:,} bytes, content {self.digest[:8]})"


def same_content(mine: tuple[str, str], theirs: tuple[str, str]) -> bool:
    """Of (digest without checksums, digest with them), the two being equal where they are not known.

    What was saved before there were two digests has only the second one, in both places.
    """
    if mine[0] != mine[1] and theirs[0] != theirs[1]:
        return mine[1] == theirs[1]
    return bool({*mine} & {*theirs})


def difference(now: Sequence[ShardRow], before: Sequence[ShardRow]) -> str:
    """What changed, in a sentence that names a shard; empty if nothing did."""
    shared = range(min(len(now), len(before)))
    changed = next((number for number in shared if not now[number].is_same(before[number])), None)
    if changed is None and len(now) == len(before):
        return ""
    totals = (
        f"{len(now):,} shards with {sum(row.samples for row in now):,} samples now, "
        f"{len(before):,} with {sum(row.samples for row in before):,} before"
    )
    if changed is not None:
        return f"{totals}; first difference at shard {changed}: {before[changed]} is now {now[changed]}"
    longer, what = (now, "added") if len(now) > len(before) else (before, "gone")
    return f"{totals}; {longer[len(shared)]} is {what}"


def rows_of_run(data_file: Path | None) -> list[ShardRow]:
    """The shards that the data file of a run folder lists; none if it cannot be read, or was written before
    it listed them. Only for messages, which do without."""
    try:
        columns = json_field(parse_json(data_file.read_bytes()), "content", list) if data_file else []
        return [ShardRow(*row) for row in columns]
    except (OSError, ValueError, TypeError):
        return []
