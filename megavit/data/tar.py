"""One walk over the headers of a tar file, which raises where tarfile would stop in silence.

Python's tarfile and webdataset take a damaged header for the end of the archive and drop the rest. What a
header states is not trusted: sizes are compared with the file before anything is read or skipped, so a walk
takes at most one turn for every 512 bytes of the file, and holds at most 1 MiB of an extended header.
"""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

from megavit.data.sources import open_regular

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED = 1 << 20  # bytes of a PAX header or a long name; names end at 4,096 on Linux
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_SPARSE = "GNU.sparse."  # what the names of its PAX records begin with


class ShardError(ValueError):
    """A shard or its index is missing, damaged or not a WebDataset; the message names it."""


def open_shard(source: str | Path | int, name: str) -> BinaryIO:
    """A shard's file, from a path or from a descriptor that stays the caller's. ShardError if it cannot be
    opened or is no regular file."""
    try:
        file = source if isinstance(source, int) else open_regular(source)
    except OSError as error:
        raise ShardError(f"shard {name} cannot be read: {error.strerror}") from error
    return open(file, "rb", buffering=_BLOCK, closefd=not isinstance(source, int))


def walk_tar(source: str | Path | int, name: str | None = None) -> list[tuple[str, int, int]]:
    """(name, data offset, size) of each regular file in a tar; webdataset's `__meta__` members are left out.

    `source` is a path or a descriptor, and `name` stands for it in messages. Raises ShardError, with the byte
    offset, for damage and for sparse members, whose bytes do not lie in the tar as they are.
    """
    name = name or str(source)
    with open_shard(source, name) as file:
        try:
            return _walk(file, name, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ShardError(f"shard {name} cannot be read: {error.strerror}") from error


def _walk(file: BinaryIO, name: str, bytes_on_disk: int) -> list[tuple[str, int, int]]:
    members: list[tuple[str, int, int]] = []
    overrides: dict[str, str] = {}  # what extended headers say about the next member
    offset = 0
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            _check_end(name, file, offset)
            return members
        if len(header) < _BLOCK and (offset or not header):
            raise ShardError(
                f"shard {name} is truncated: it ends at byte {bytes_on_disk}, without a tar's block of zeros"
            )
        info = _header(header, offset, name)
        is_extended = info.type in _EXTENDED
        size = info.size if is_extended else _size(overrides.get("size"), info.size, offset, name)
        if size < 0:
            raise ShardError(
                f"shard {name} is damaged: a size of {size} bytes in the header at byte {offset}"
            )
        data = offset + _BLOCK
        following = data
        # Links and folders may state a size but have no data, as in tarfile.
        if is_extended or info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            following += -(-size // _BLOCK) * _BLOCK
            if data + size > bytes_on_disk:
                raise ShardError(
                    f"shard {name} is truncated: {info.name!r} (header at byte {offset}) ends past its "
                    f"{bytes_on_disk} bytes"
                )
        if is_extended:
            # The first header for a member wins, as in tarfile.
            overrides = _extended(info.type, file, size, data, name) | overrides
        else:
            if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(_SPARSE) for key in overrides):
                raise ShardError(
                    f"shard {name}: {info.name!r} (header at byte {offset}) is stored as a sparse file, "
                    f"which cannot be read by offset; write the shard again without tar's --sparse"
                )
            member = overrides.get("path", info.name)
            if info.isreg() and not _META.match(member):
                members.append((member, data, size))
            overrides = {}
        offset = following


def _header(block: bytes, offset: int, name: str) -> tarfile.TarInfo:
    for magic, kind in _COMPRESSED.items() if offset == 0 else ():
        if block.startswith(magic):
            raise ShardError(f"shard {name} is compressed ({kind}) and cannot be read by offset; unpack it")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        found = f", where it begins with {block[:24]!r}" if offset == 0 else ""
        raise ShardError(f"shard {name} is damaged or truncated: {error} at byte {offset}{found}") from error


def _check_end(name: str, file: BinaryIO, offset: int) -> None:
    """A zero block ends the archive: anything but zeros behind it is a header that was overwritten."""
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise ShardError(
                f"shard {name} is damaged: zeros instead of a header at byte {offset}, data behind them"
            )


def _size(override: str | None, stated: int, offset: int, name: str) -> int:
    """The size of a member: the one of its PAX header, if that has any."""
    if override is None:
        return stated
    if not (override.isascii() and override.isdecimal() and len(override) < 20):  # 2 ** 63 has 19 digits
        raise ShardError(
            f"shard {name} is damaged: a PAX header states the size {override[:40]!r} for the member at byte "
            f"{offset}"
        )
    return int(override)


def _extended(kind: bytes, file: BinaryIO, size: int, data: int, name: str) -> dict[str, str]:
    """What an extended header, whose content is at byte `data`, says about the member behind it."""
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    if size > _MAX_EXTENDED:
        raise ShardError(
            f"shard {name} is damaged: an extended header of {size} bytes at byte {data - _BLOCK}, more than "
            f"{_MAX_EXTENDED}"
        )
    content = file.read(size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    records = _pax_records(content, data, name)
    if kind != tarfile.XGLTYPE:
        return records
    if changed := {key for key in records if key in ("path", "size") or key.startswith(_SPARSE)}:
        raise ShardError(
            f"shard {name}: the PAX header at byte {data} sets {min(changed)!r} for all members, which "
            f"cannot be meant"
        )
    return {}


def _pax_records(data: bytes, offset: int, name: str) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records of a PAX extended header."""
    records = {}
    start = 0
    while start < len(data):
        digits, _, _ = data[start : start + 20].partition(b" ")
        end = start + int(digits) if digits.isdigit() else start
        record = data[start + len(digits) + 1 : end]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        try:
            # A record that does not end behind its start would be read for ever.
            if end > len(data) or not (key and equals and record.endswith(b"\n")):
                raise ValueError(f"{data[start : start + 24]!r} begins no record")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        except ValueError as error:
            raise ShardError(
                f"shard {name} is damaged: bad PAX header at byte {offset + start} ({error})"
            ) from error
        start = end
    return records
