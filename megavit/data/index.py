"""Where every sample lies inside its tar shard: one walk over the headers, then reading by offset.

A shard is a plain WebDataset tar: members `KEY.EXT`, those of one key next to each other. Python's tarfile
and webdataset take a damaged header for the end of the archive and silently drop the rest; the walk here
raises instead. An index file (`SHARD.tar.idx`) is a JSON line and flat arrays, mapped into memory and not
parsed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from isal.isal_zlib import crc32
from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
INDEX_SUFFIX = ".idx"
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = "megavit-index-1"
_ALIGNMENT = 16
_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4"), ("extension", "<u4")])
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
_REINDEX = "make it again with launch/shards.py index"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardError(ValueError):
    """A shard or its index is missing, damaged or not a WebDataset; the message names it."""


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
        """Names the content: members, keys and checksums, wherever the shard lies."""
        return blake2b(self._payload(), digest_size=16).hexdigest()

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
        }
        line = json.dumps(header).encode()
        return line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n" + payload

    @staticmethod
    def from_bytes(data: bytes | np.ndarray, name: str, check: bool = True) -> ShardIndex:
        """The index in a file's content, without a copy. ShardError, with `name`, if it is damaged."""
        content = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        header, payload = _split_header(content, name)
        if check and blake2b(memoryview(payload), digest_size=16).hexdigest() != header["digest"]:
            raise ShardError(f"index {name} is damaged (its digest differs); {_REINDEX}")
        samples = header["samples"]
        parts = []
        for dtype, count in ((np.int64, samples + 1), (_MEMBER, header["members"]), (np.int64, samples)):
            end = np.dtype(dtype).itemsize * count
            parts.append(payload[:end].view(dtype))
            payload = payload[end:]
        first, members, key_ends = parts
        return ShardIndex(
            header["shard_bytes"],
            header["checksums"],
            tuple(header["extensions"]),
            first,
            members,
            key_ends,
            payload,
        )

    def _payload(self) -> bytes:
        arrays = (self.first, self.members, self.key_ends, self.key_text)
        return b"".join(array.tobytes() for array in arrays)


def _split_header(content: np.ndarray, name: str) -> tuple[dict, np.ndarray]:
    line = bytes(content[:4096]).partition(b"\n")[0]
    try:
        header = json.loads(line)
        if header["format"] != _MAGIC:
            raise ValueError(f"its format is {header['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{name} is not an index of this version ({error}); {_REINDEX}") from error
    return header, content[len(line) + 1 :]


def index_header(path: str | Path) -> dict:
    """Counts, sizes and digest of an index file, from its first line. ShardError if it is no index."""
    with open(path, "rb") as file:
        return _split_header(np.frombuffer(file.read(4096), np.uint8), str(path))[0]


def read_index(path: str | Path, check: bool = True) -> ShardIndex:
    """Map an index file into memory. ShardError if it is missing or damaged; to `check` that costs one read.

    An open map holds a file descriptor.
    """
    try:
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ShardError(f"index {path} cannot be read: {error}") from error
    return ShardIndex.from_bytes(content, str(path), check)


def index_shard(path: str | Path, *, checksums: bool = True, name: str | None = None) -> ShardIndex:
    """Walk one tar's headers (USTAR, PAX and GNU long names), and with `checksums` its data.

    Members are grouped and extensions split as webdataset does. A sample that lacks its image or label is
    kept: training counts it as bad. Raises ShardError for damage, with the byte offset; `name` stands for the
    path in messages. Costs 20 us a member, and with checksums one pass over the file.
    """
    name = name or str(path)
    groups: list[tuple[str, list[tuple[str, int, int]]]] = []
    for member, offset, size in walk_tar(path, name):
        key, extension = base_plus_ext(member)
        if key is None or Path(member).name.startswith("."):
            continue
        if not groups or groups[-1][0] != key:
            groups.append((key, []))
        if any(extension.lower() == seen for seen, _, _ in groups[-1][1]):
            raise ShardError(
                f"shard {name}: {member!r} appears twice (again at byte {offset}); keys must be unique"
            )
        groups[-1][1].append((extension.lower(), offset, size))
    if not groups:
        raise ShardError(f"shard {name} holds no samples")
    extensions: dict[str, int] = {}
    rows = [
        (offset, size, 0, extensions.setdefault(extension, len(extensions)))
        for _, group in groups
        for extension, offset, size in group
    ]
    members = np.array(rows, _MEMBER)
    if checksums:
        members["crc32"] = list(_checksums(path, members))
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in groups]
    return ShardIndex(
        shard_bytes=os.path.getsize(path),
        has_checksums=checksums,
        extensions=tuple(extensions),
        first=np.cumsum([0, *(len(group) for _, group in groups)], dtype=np.int64),
        members=members,
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_text=np.frombuffer(b"".join(keys), np.uint8),
    )


def _checksums(path: str | Path, members: np.ndarray) -> Iterator[int]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        for offset, size in zip(members["offset"].tolist(), members["size"].tolist(), strict=True):
            yield crc32(view[offset : offset + size])
        view.release()


def walk_tar(path: str | Path, name: str | None = None) -> list[tuple[str, int, int]]:
    """(name, data offset, size) of each regular file in a tar; webdataset's `__meta__` members are left out.

    Raises ShardError where tarfile would stop in silence.
    """
    name = name or str(path)
    members: list[tuple[str, int, int]] = []
    try:
        size_on_disk = os.path.getsize(path)
        file = open(path, "rb", buffering=_BLOCK)  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise ShardError(f"shard {name} cannot be read: {error.strerror}") from error
    overrides: dict[str, str] = {}
    with file:
        offset = 0
        while True:
            file.seek(offset)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                _check_end(name, file, offset)
                return members
            info = _header(header, offset, name)
            size = int(overrides.get("size", info.size))
            data, offset = offset + _BLOCK, offset + _BLOCK
            # Links and folders may state a size but have no data, as in tarfile.
            if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _EXTENDED:
                offset += -(-size // _BLOCK) * _BLOCK
                if data + size > size_on_disk:
                    raise ShardError(
                        f"shard {name} is truncated: {info.name!r} ends past its {size_on_disk} bytes"
                    )
            if info.type == tarfile.GNUTYPE_LONGNAME:
                overrides["path"] = file.read(size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                overrides.update(_pax_records(file.read(size), data, name))
            elif info.type not in _EXTENDED:
                member = overrides.get("path", info.name)
                if info.isreg() and not _META.match(member):
                    members.append((member, data, size))
                overrides = {}


_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


def _header(block: bytes, offset: int, name: str) -> tarfile.TarInfo:
    for magic, kind in _COMPRESSED.items() if offset == 0 else ():
        if block.startswith(magic):
            raise ShardError(f"shard {name} is compressed ({kind}) and cannot be read by offset; unpack it")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"shard {name} is damaged or truncated: {error} at byte {offset}") from error


def _check_end(name: str, file: BinaryIO, offset: int) -> None:
    """A zero block ends the archive: anything but zeros behind it is a header that was overwritten."""
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise ShardError(
                f"shard {name} is damaged: zeros instead of a header at byte {offset}, data behind them"
            )


def _pax_records(data: bytes, offset: int, name: str) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records of a PAX extended header."""
    records = {}
    try:
        while data:
            length = int(data.split(b" ", 1)[0])
            key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            if length < 5:  # the shortest record, `5 a=\n`; a smaller one would repeat for ever
                raise ValueError(f"a record of {length} bytes")
            data = data[length:]
    except (ValueError, IndexError) as error:
        raise ShardError(f"shard {name} is damaged: bad PAX header at byte {offset} ({error})") from error
    return records
