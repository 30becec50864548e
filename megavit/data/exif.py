"""How a camera was held: the EXIF orientation of a JPEG, PNG or WebP, read from the bytes.

It costs a few microseconds, where a library that opens the file for it takes longer than some decodes.
"""

from __future__ import annotations

import struct

import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; right and bottom are exclusive

UPRIGHT = 1
_ORIENTATION, _SHORT = 0x0112, 3
_PREFIX = b"Exif\0\0"
_START_OF_SCAN = 0xDA


def orientation(data: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 (as stored) without the tag, or where it cannot be read."""
    if data.startswith(b"\xff\xd8"):
        found = _in_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        found = _in_png(data)
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8X":  # the other kinds of WebP have no EXIF
        found = _in_webp(data)
    else:
        return UPRIGHT
    return _in_tiff(found.removeprefix(_PREFIX)) if found else UPRIGHT


def upright_size(width: int, height: int, turn: int) -> tuple[int, int]:
    """The size at which a stored image of orientation `turn` is shown."""
    return (height, width) if turn >= 5 else (width, height)


def stored_box(box: Box, width: int, height: int, turn: int) -> Box:
    """Where a box of the upright image lies in the stored one of `width` x `height` pixels."""
    left, top, right, bottom = box
    if turn >= 5:
        left, top, right, bottom = top, left, bottom, right
    if turn in (2, 3, 7, 8):
        left, right = width - right, width - left
    if turn in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """[H, W, C] as stored -> as shown, contiguous."""
    if turn in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


def _in_jpeg(data: bytes) -> bytes:
    """The EXIF segment, one of those before the pixels; empty without one."""
    at, end = 2, len(data) - 4
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xE1 and data.startswith(_PREFIX, at + 4):
            return data[at + 4 : at + 2 + (data[at + 2] << 8 | data[at + 3])]
        if marker == _START_OF_SCAN:
            break
        # Any number of 0xff may come before a marker.
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return b""


def _in_png(data: bytes) -> bytes:
    """The EXIF chunk, which may come after the pixels."""
    at = 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            return data[at + 8 : at + 8 + size]
        at += 12 + size
    return b""


def _in_webp(data: bytes) -> bytes:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return b""


def _in_tiff(data: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return UPRIGHT
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    if first + 2 > len(data):
        return UPRIGHT
    (count,) = struct.unpack_from(f"{order}H", data, first)
    for at in range(first + 2, min(first + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, at)
        if tag == _ORIENTATION:
            return value if kind == _SHORT and 1 <= value <= 8 else UPRIGHT
    return UPRIGHT
