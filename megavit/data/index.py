"""Where every sample lies inside its tar shard: one walk over the headers, then reading by offset.

A shard is a plain WebDataset tar: members `KEY.EXT`, those of one key next to each other. An index file
(`SHARD.tar.idx`) is a JSON line and flat arrays, mapped into memory and not parsed.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from webdataset.tariterators import base_plus_ext

from megavit.data.json_data import json_field, parse_json
from megavit.data.sources import open_regular
from megavit.data.tar import ShardError, open_shard, walk_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4",)
LABEL_EXTENSIONS = ("cls", "json")
SOURCE_EXTENSION = "source.txt"  # the file that a sample was made from; read when it is reported only
INDEX_SUFFIX = ".idx"
_HEADER_BYTES = 4096  # the most that the JSON line of an index file may have
_MAX_EXTENSIONS = 3000  # characters of all extensions as JSON: the rest of that line is below 1,000
_MAGIC = "megavit-index-1"
_ALIGNMENT = 16
_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4"), ("extension", "<u4")])
_REINDEX = "make it again with launch/shards.py index"


class Member(NamedTuple):
    """One file of a sample: where it lies in the tar, in bytes. `crc32` is None in an index without
    checksums."""

    extension: str
    offset: int
    size: int
    crc32: int | None


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples: members [m] in tar order, and for sample i the range first[i]:first[i+1] of them.

    About 24 bytes a member and the key; the arrays may be views of a memory-mapped file.
    """

    shard_bytes: int
    has_checksums: bool
    extensions: tuple[str, ...]
    first: np.ndarray  # int64 [n + 1]
    members: np.ndarray  # _MEMBER [m]
    key_ends: np.ndarray  # int64 [n]
    key_text: np.ndarray  # uint8, UTF-8 keys one after the other

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, index: int) -> str:
        """The sample's `__key__`."""
        start = int(self.key_ends[index - 1]) if index else 0
        return bytes(self.key_text[start : int(self.key_ends[index])]).decode("utf-8", "surrogateescape")

    def sample(self, index: int) -> dict[str, Member]:
        """The sample's members by lower-case extension."""
        found = {}
        first, last = self.first[index : index + 2].tolist()
        for offset, size, crc, extension in self.members[first:last].tolist():
            name = self.extensions[extension]
            found[name] = Member(name, offset, size, crc if self.has_checksums else None)
        return found

    @property
    def digest(self) -> str:
        """Names members, keys and, where they are known, checksums, wherever the shard lies."""
        return blake2b(self._payload(), digest_size=16).hexdigest()

    @property
    def content_digest(self) -> str:
        """Names members and keys alone: the same whether checksums are known or not, where `digest` is this
        one without them."""
        if not self.has_checksums:
            return self.digest
        bare = self.members.copy()
        bare["crc32"] = 0
        return replace(self, members=bare).digest

    def to_bytes(self) -> bytes:
        """The index file's content."""
        payload = self._payload()
        header = {
            "format": _MAGIC,
            "shard_bytes": self.shard_bytes,
            "samples": len(self),
            "members": len(self.members),
            "checksums": self.has_checksums,
            "extensions": self.extensions,
            "digest": blake2b(payload, digest_size=16).hexdigest(),
            "content": self.content_digest,
        }
        line = json.dumps(header).encode()
        return line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n" + payload

    @staticmethod
    def from_bytes(data: bytes | np.ndarray, name: str, check: bool = True) -> ShardIndex:
        """The index in a file's content, without a copy. ShardError, with `name`, if it is damaged; without
        `check`, only its length is compared."""
        content = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        header, payload = _split_header(content, name)
        if check and blake2b(payload.data, digest_size=16).hexdigest() != header["digest"]:
            raise ShardError(f"index {name} is damaged (its digest differs); {_REINDEX}")
        samples, members = header["samples"], header["members"]
        parts = []
        for dtype, count in ((np.int64, samples + 1), (_MEMBER, members), (np.int64, samples)):
            end = np.dtype(dtype).itemsize * count
            if end > len(payload):
                raise ShardError(f"index {name} is cut off: it states {samples} samples; {_REINDEX}")
            parts.append(payload[:end].view(dtype))
            payload = payload[end:]
        first, rows, key_ends = parts
        found = ShardIndex(
            header["shard_bytes"],
            header["checksums"],
            tuple(header["extensions"]),
            first,
            rows,
            key_ends,
            payload,
        )
        if check and not found._is_consistent():
            raise ShardError(f"index {name} is damaged (it names places outside the shard); {_REINDEX}")
        return found

    def _is_consistent(self) -> bool:
        """Whether every number leads to a place inside the shard, the members or the keys."""
        offset, size = self.members["offset"], self.members["size"]
        return bool(
            _rises(self.first, 0, len(self.members))
            and _rises(np.append(0, self.key_ends), 0, len(self.key_text))
            and (offset >= 0).all()
            and (size >= 0).all()
            and (size <= self.shard_bytes - offset).all()
            and (self.members["extension"] < len(self.extensions)).all()
        )

    def _payload(self) -> bytes:
        arrays = (self.first, self.members, self.key_ends, self.key_text)
        return b"".join(array.tobytes() for array in arrays)


def _rises(values: np.ndarray, first: int, last: int) -> bool:
    """Whether `values` go from `first` to `last` without a step down."""
    return bool(values[0] == first and values[-1] == last and (values[1:] >= values[:-1]).all())


def _split_header(content: np.ndarray, name: str) -> tuple[dict, np.ndarray]:
    line = bytes(content[:_HEADER_BYTES]).partition(b"\n")[0]
    try:
        header = parse_json(line)
        if json_field(header, "format", str) != _MAGIC:
            raise ValueError(f"its format is {header['format'][:40]!r}")
        numbers = [json_field(header, key, int) for key in ("shard_bytes", "samples", "members")]
        if not all(0 <= number < 1 << 62 for number in numbers):
            raise ValueError(f"its counts are {numbers}"[:200])
        json_field(header, "checksums", bool)
        json_field(header, "digest", str)
        if "content" in header:
            json_field(header, "content", str)
        if not all(isinstance(extension, str) for extension in json_field(header, "extensions", list)):
            raise ValueError("its extensions are no strings")
    except ValueError as error:
        raise ShardError(f"{name} is not an index of this version ({error}); {_REINDEX}") from error
    return header, content[len(line) + 1 :]


def _open_index(path: str | Path) -> BinaryIO:
    try:
        return open(open_regular(path), "rb")
    except OSError as error:
        raise ShardError(f"index {path} cannot be read: {error.strerror}") from error


def index_header(path: str | Path) -> dict:
    """Counts, sizes and digests of an index file, from its first line. ShardError if it is no index."""
    with _open_index(path) as file:
        header, _ = _split_header(np.frombuffer(file.read(_HEADER_BYTES), np.uint8), str(path))
    # Index files written before this field was there: one read of the whole.
    return header if "content" in header else header | {"content": read_index(path).content_digest}


def read_index(path: str | Path, check: bool = True) -> ShardIndex:
    """Map an index file into memory. ShardError if it is missing or damaged; to `check` that costs one read.

    An open map holds a file descriptor.
    """
    with _open_index(path) as file:
        try:
            content = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ShardError(f"index {path} cannot be read: {error}") from error
    return ShardIndex.from_bytes(content, str(path), check)


def index_shard(source: str | Path | int, *, checksums: bool = True, name: str | None = None) -> ShardIndex:
    """Walk one tar's headers (USTAR, PAX and GNU long names), and with `checksums` its data.

    `source` is a path or a descriptor, and `name` stands for it in messages. Members are grouped and
    extensions split as webdataset does. A sample that lacks its image or label is kept: training counts it as
    bad. Raises ShardError for damage, with the byte offset. Costs 20 us a member, and with checksums one pass
    over the file.
    """
    name = name or str(source)
    with open_shard(source, name) as file:
        groups = _group(walk_tar(file.fileno(), name), name)
        extensions: dict[str, int] = {}
        rows = [
            (offset, size, 0, extensions.setdefault(extension, len(extensions)))
            for _, group in groups
            for extension, (offset, size) in group.items()
        ]
        if len(json.dumps(list(extensions))) > _MAX_EXTENSIONS:
            some = ", ".join(repr(extension[:40]) for extension in list(extensions)[:3])
            raise ShardError(
                f"shard {name}: {len(extensions)} different extensions ({some}, ...), too many to be meant; "
                f"the key of a sample ends at the first dot of its name"
            )
        members = np.array(rows, _MEMBER)
        if checksums:
            members["crc32"] = list(_checksums(file, members))
        shard_bytes = os.fstat(file.fileno()).st_size
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in groups]
    return ShardIndex(
        shard_bytes=shard_bytes,
        has_checksums=checksums,
        extensions=tuple(extensions),
        first=np.cumsum([0, *(len(group) for _, group in groups)], dtype=np.int64),
        members=members,
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_text=np.frombuffer(b"".join(keys), np.uint8),
    )


def _group(walked: list[tuple[str, int, int]], name: str) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The key and the (offset, size) of each lower-case extension, for every sample in a tar's order."""
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for member, offset, size in walked:
        key, extension = base_plus_ext(member)
        if key is None or Path(member).name.startswith("."):
            continue
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        if extension.lower() in groups[-1][1]:
            raise ShardError(
                f"shard {name}: {member!r} appears twice (again at byte {offset}); keys must be unique"
            )
        groups[-1][1][extension.lower()] = (offset, size)
    if not groups:
        raise ShardError(f"shard {name} holds no samples")
    return groups


def _checksums(file: BinaryIO, members: np.ndarray) -> Iterator[int]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        for offset, size in zip(members["offset"].tolist(), members["size"].tolist(), strict=True):
            yield crc32(view[offset : offset + size])
        view.release()
