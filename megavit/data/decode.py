"""From the bytes of one file to a row of the batch: decode, crop, resize.

Where to crop is the caller's business (`choose_box`), as are random numbers, flips and labels. A JPEG goes
through simplejpeg, which, unlike Pillow and OpenCV, raises when libjpeg warns of damage; PNG and WebP go
through Pillow, and nothing else is opened. An image with an EXIF orientation is shown upright: sizes and
boxes are those of the upright image.

Letters: S image side, C channels, H and W the sides of the crop.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from megavit.data.exif import UPRIGHT, Box, orientation, stored_box, turned, upright_size
from megavit.data.images import FORMATS, DecodeError, check_pixels, open_image, pillow_errors

_START, _END = b"\xff\xd8", b"\xff\xd9"  # first and last marker of a JPEG
_PACKAGES = {"cv2": "opencv-python-headless", "nvidia.nvimgcodec": "nvidia-nvimgcodec-cu13"}


@dataclass(frozen=True)
class Decoder:
    """Settings of the decoder; holds no native handle, so it can be pickled into worker processes.

    channels: 1 (grey) or 3 (RGB). size: S.
    antialias: average over the source pixels that an output pixel covers, as Pillow's BILINEAR does; without
    it, interpolate between the nearest four, which needs OpenCV.
    backend: "full" decodes the whole JPEG; "region" only the crop, with nvImageCodec on the CPU. The pixels
    are the same. "region" saves 5 to 10% of the time, but sees no damage inside a JPEG except truncation: use
    it on shards whose checksums are verified. nvImageCodec writes to stderr when loaded and on damage.
    max_pixels: an image with more, by its header, is refused. Decoding takes up to 16 bytes a pixel (WebP;
    PNG 14, JPEG 3, or 9 if it is progressive and 14 if it is CMYK).
    formats: of the files that are opened, as Pillow calls them.
    """

    channels: int
    size: int
    antialias: bool = True
    backend: str = "full"
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 (grey) or 3 (RGB)")
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")
        if self.backend not in ("full", "region"):
            raise ValueError(f"backend is {self.backend!r}; it must be 'full' or 'region'")
        if not self.antialias:
            _require("cv2", "antialias=False")
        if self.backend == "region":
            _require("nvidia.nvimgcodec", "backend='region'")

    def load(
        self,
        data: bytes,
        choose_box: Callable[[int, int], Box],
        out: np.ndarray,
        place: Callable[[], Box] | None = None,
    ) -> None:
        """Decode, crop to `choose_box(width, height)`, resize into `out`, uint8 [S, S, C], contiguous; if
        there is `place`, which is called after `choose_box`, into that box of it.

        `choose_box` is called once, before any pixel is decoded; its box must be integers inside the image. A
        box of S x S is copied, not resized. Raises DecodeError for bad bytes (`out` is then as it was) and
        ValueError for a box outside the image. Cost for 400x500 pixels at 224: 1.37 times the bare JPEG
        decode with antialias, 1.18 times without.
        """
        assert out.shape == (self.size, self.size, self.channels) and out.flags.c_contiguous
        pixels = self.crop(data, choose_box)
        resize_into(pixels, self.antialias, place() if place else (0, 0, self.size, self.size), out)

    def load_image(self, image: Image.Image, choose_box: Callable[[int, int], Box], out: np.ndarray) -> None:
        """`load` of an image that Pillow has opened already, of any format and size."""
        resize(self.crop_image(image, choose_box), self.antialias, out)

    def crop(self, data: bytes, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """What `load` resizes: the pixels of the box, uint8 [H, W, C]."""
        turn = orientation(data)

        def box_in_file(width: int, height: int) -> Box:
            upright = upright_size(width, height, turn)
            return stored_box(_inside(choose_box(*upright), *upright), width, height, turn)

        decode = self._from_jpeg if data.startswith(_START) else self._from_pillow
        crop = decode(data, box_in_file)
        return crop if turn == UPRIGHT else turned(crop, turn)

    def crop_image(self, image: Image.Image, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """`crop` of an image that Pillow has opened already."""
        return self._from_image(image, lambda *size: _inside(choose_box(*size), *size))

    def _from_jpeg(self, data: bytes, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """uint8 [H, W, C], a view with the rows of the whole image where that was decoded."""
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError(f"JPEG header: {error}") from error
        if colors in ("CMYK", "YCCK"):  # Pillow knows that Adobe stores these inverted
            return self._from_pillow(data, choose_box)
        check_pixels(width, height, self.max_pixels, data)
        left, top, right, bottom = box = choose_box(width, height)
        # The region decoder stops reading below the box: a file that ends early must go the strict way.
        if self.backend == "region" and data.endswith(_END):
            region = _region_decoder(self.channels)(data, box)
            if region is not None:
                return region
        try:
            pixels = simplejpeg.decode_jpeg(data, "GRAY" if self.channels == 1 else "RGB")
        except ValueError as error:
            raise DecodeError(f"JPEG: {error}") from error
        return pixels[top:bottom, left:right]

    def _from_pillow(self, data: bytes, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        return self._from_image(open_image(data, self.max_pixels, self.formats), choose_box)

    def _from_image(self, image: Image.Image, choose_box: Callable[[int, int], Box]) -> np.ndarray:
        """uint8 [H, W, C]. Palettes are looked up, alpha is dropped, 16 bits keep their upper 8."""
        box = choose_box(*image.size)
        with pillow_errors(self.formats):
            image = image.crop(box)  # decodes; a truncated file raises
        image = _in_8_bits(image)
        with pillow_errors(self.formats):
            pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        return pixels.reshape(*pixels.shape[:2], self.channels)


def resize(pixels: np.ndarray, antialias: bool, out: np.ndarray) -> None:
    """uint8 or float32 [H, W, C] into `out` of the same type, [S, S, C] or of other sides, bilinear; a copy
    if the sizes are equal."""
    if pixels.shape == out.shape:
        out[:] = pixels
    elif antialias:
        # functional.interpolate returns planar memory for a batch of one, and making rows of that costs
        # as much as the resize. The operator below it writes to the row as it lies.
        torch.ops.aten._upsample_bilinear2d_aa.out(
            _planes(pixels), out.shape[:2], False, None, None, out=_planes(out)
        )
    else:
        _opencv().resize(pixels, out.shape[1::-1], dst=out)  # INTER_LINEAR


def resize_into(pixels: np.ndarray, antialias: bool, box: Box, out: np.ndarray) -> None:
    """As `resize`, into the `box` of `out` [S, S, C]; the rest stays."""
    left, top, right, bottom = box
    if box == (0, 0, out.shape[1], out.shape[0]):
        return resize(pixels, antialias, out)
    part = np.empty((bottom - top, right - left, out.shape[2]), out.dtype)
    resize(pixels, antialias, part)
    out[top:bottom, left:right] = part


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits with their upper 8, where `convert` would clip at 255. DecodeError for
    numbers that have no such scale."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    # Pillow has whole numbers of 16 bits as I;16 or, by version and format, as I, which is of 32.
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 1 << 16:
        raise DecodeError("its pixels are floating point or of 32 bits; save it with 8 or 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _inside(box: Box, width: int, height: int) -> Box:
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"box {box} is empty or not inside the image of {width}x{height} pixels")
    return box


def _planes(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, C] seen as [1, C, H, W], without a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _require(module: str, setting: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        found = False
    if not found:
        raise ValueError(f"{setting} needs a package that is not installed: pip install {_PACKAGES[module]}")


@functools.cache
def _opencv() -> Any:
    """OpenCV, without threads of its own: the loader's parallelism is its processes."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


@functools.cache
def _region_decoder(channels: int) -> Callable[[bytes, Box], np.ndarray | None]:
    """(JPEG bytes, box) -> uint8 [H, W, C], or None where nvImageCodec fails; one per process."""
    # Its GPU plugins complain that there is no CUDA toolkit.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    from nvidia import nvimgcodec as nv

    decoder = nv.Decoder(
        device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nv.Backend(nv.BackendKind.CPU_ONLY)],
    )
    color = nv.ColorSpec.GRAY if channels == 1 else nv.ColorSpec.SRGB
    params = nv.DecodeParams(apply_exif_orientation=False, color_spec=color)

    def decode_region(data: bytes, box: Box) -> np.ndarray | None:
        left, top, right, bottom = box
        try:
            stream = nv.CodeStream(data).get_sub_code_stream(0, nv.Region(top, left, bottom, right))
            image = decoder.decode(stream, params=params)
        except RuntimeError:  # its own parser is stricter about headers than libjpeg
            return None
        return None if image is None else np.asarray(image)

    return decode_region
