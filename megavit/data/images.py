"""Opening an image as far as its header: what kind it is and how large, before memory is taken for its
pixels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from PIL import Image

from megavit.data.exif import orientation, upright_size

# Of the extensions that are read, as Pillow calls them. It knows 40 more, and starts Ghostscript for one.
FORMATS = ("JPEG", "PNG", "WEBP")


class DecodeError(ValueError):
    """The bytes are no usable image; the message says why."""


def open_image(data: bytes, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image in `data`, with no pixel decoded. DecodeError for another format than `formats`, whatever the
    file is called, for a damaged header, and for more than `max_pixels`."""
    with pillow_errors(formats):
        image = Image.open(io.BytesIO(data), formats=formats)
    check_pixels(*image.size, max_pixels, data)
    return image


def check_pixels(width: int, height: int, max_pixels: int, data: bytes) -> None:
    """DecodeError if the image in `data`, stored as `width` x `height` pixels, has too many."""
    if width * height > max_pixels:
        width, height = upright_size(width, height, orientation(data))
        raise DecodeError(f"{width}x{height} pixels are more than --data.max_pixels {max_pixels}")


@contextlib.contextmanager
def pillow_errors(formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    """Turns every exception inside into a DecodeError.

    Pillow's plugins raise whatever a damaged field runs into: OSError, SyntaxError, struct.error and more.
    """
    try:
        yield
    except Image.UnidentifiedImageError as error:  # its own text is the address of a buffer
        raise DecodeError(f"not an image of a known format ({', '.join(formats)})") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too many pixels for --data.max_pixels: {error}") from error
    except Exception as error:
        raise DecodeError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
