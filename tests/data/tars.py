"""Tar files put together by hand, with what no tar program writes."""

from __future__ import annotations

import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

END = bytes(2 * tarfile.BLOCKSIZE)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def header(name: str, size: int | bytes = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a right checksum; `size` as a number (negative ones in base 256), or as its twelve
    bytes."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header that holds `records`."""
    return header("pax", len(records), kind) + padded(records)


def record(key: str, value: str) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where the length counts its own digits."""
    rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def sample(key: str = "a") -> bytes:
    """A whole sample: an image that none can be decoded from, and a label."""
    return member(f"{key}.png", b"pixels") + member(f"{key}.cls", b"1")


@contextmanager
def alarm(seconds: int = 120) -> Iterator[None]:
    """Ends what would go on for ever; what is tested takes milliseconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
