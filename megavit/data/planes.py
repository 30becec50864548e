"""Files of dense values as they were stored: PNG with 8 or 16 bits a channel, and NumPy's npy.

Letters: H and W the sides, C channels.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable

import numpy as np

from megavit.data.images import DecodeError, open_image, pillow_errors

PLANE_KINDS = ("png", "npy")
_GREY, _RGB, _RGBA = 0, 2, 6  # colour types of a PNG


def read_plane(data: bytes, kind: str, check_size: Callable[[int, int], object]) -> np.ndarray:
    """The values [H, W, C] of a PNG or npy file, not scaled to anything: of a palette the indexes, of a grey
    PNG the numbers of its 1 to 16 bits.

    `check_size(width, height)` may refuse the size before memory is taken. DecodeError for bytes that are no
    such file. The array may be a read-only view of `data`.
    """
    values = (_read_npy if kind == "npy" else _read_png)(data, check_size)
    return values.reshape(*values.shape[:2], -1)


def known_pixels(values: np.ndarray, invalid: float | None) -> np.ndarray:
    """bool, of the shape of `values`: which of a plane's stored numbers say something: those that are finite
    and not `invalid`."""
    known = np.isfinite(values)
    return known if invalid is None else known & (values != invalid)


def check_values(
    stored: np.ndarray, invalid: float | None, classes: int | None, allow_empty: bool, member: str
) -> None:
    """ValueError, naming the member, if a plane holds numbers outside of 0 to `classes` - 1 that are not
    `invalid`, or, without `allow_empty`, none that is known."""
    if classes is None and allow_empty:
        return
    known = known_pixels(stored, invalid)
    if not allow_empty and not known.any():
        raise ValueError(f"its {member} has no pixel of which anything is known")
    if classes is not None and (wrong := known & ~((stored >= 0) & (stored < classes))).any():
        raise ValueError(f"its {member} holds class {stored[wrong][0]}, which is outside 0..{classes - 1}")


def _read_png(data: bytes, check_size: Callable[[int, int], object]) -> np.ndarray:
    image = open_image(data, sys.maxsize)
    if image.format != "PNG":
        raise DecodeError(f"it is {image.format}, not PNG, although it is called so")
    check_size(*image.size)
    bits, colors = data[24], data[25]
    if bits == 16 and colors in (_RGB, _RGBA):
        return _sixteen_bit_colors(data, image.size)
    if bits == 16 and colors != _GREY:
        raise DecodeError("a PNG with 16 bits of grey and alpha, which cannot be read; write npy")
    with pillow_errors():
        values = np.asarray(image)
    if colors == _GREY and bits in (2, 4):  # Pillow spreads them over 0 to 255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _sixteen_bit_colors(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """uint16 [H, W, 3 or 4]: Pillow would keep the upper 8 bits only."""
    import cv2

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[1::-1] != size:
        raise DecodeError("PNG: it is damaged")
    order = [2, 1, 0, 3][: values.shape[2]]  # OpenCV has blue first
    return values[:, :, order]


def _read_npy(data: bytes, check_size: Callable[[int, int], object]) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read[version](file)
    except Exception as error:  # whatever its parser of Python literals runs into
        raise DecodeError("its npy header cannot be read") from error
    if dtype.kind not in "uifb":
        raise DecodeError(f"its npy holds {dtype}, not numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise DecodeError(f"its npy has shape {list(shape)}, not [H, W] or [H, W, C]")
    check_size(shape[1], shape[0])
    if len(data) - file.tell() != dtype.itemsize * math.prod(shape):
        raise DecodeError(f"its npy has {len(data) - file.tell()} bytes of values for shape {list(shape)}")
    values = np.frombuffer(data, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")
