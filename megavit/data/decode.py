"""From encoded bytes to a uint8 crop of the model's size.

JPEGs by libjpeg-turbo, strictly: its warnings, which PIL, torchvision and opencv swallow, are damaged images.
The rest by PIL. EXIF orientation is ignored, as by torchvision's and big_vision's loaders. Letters: S side, C
channels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom
_JPEG = b"\xff\xd8"
_MAX_PIXELS = 2 * 89_478_485  # where PIL refuses an image as a decompression bomb


class DecodeError(ValueError):
    """The bytes are no usable image; the message says why."""


class Decoder:
    """Decodes, crops and resizes to [S, S, C] uint8, grey (`channels` 1) or RGB (3).

    `antialias` low-passes before shrinking. `backend` full decodes the whole image; region, with the
    nvidia-nvimgcodec-cu13 package, only the crop, but its decoder swallows warnings: use it on shards with
    checksums. ValueError if that package is missing. Pickles to worker processes.
    """

    def __init__(self, channels: int, size: int, antialias: bool = True, backend: str = "full"):
        self.channels, self.size, self.antialias, self.backend = channels, size, antialias, backend
        self._region: _RegionDecoder | None = None
        if backend == "region":
            _RegionDecoder.require()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_region": None}  # a native handle does not travel

    def load(self, data: bytes, choose_box: Callable[[int, int], Box], out: np.ndarray) -> None:
        """Decode `data`, crop to choose_box(width, height), resize into `out`, [S, S, C] uint8.

        A crop of the model's size is copied pixel by pixel. Raises DecodeError.
        """
        if data.startswith(_JPEG):
            self._load_jpeg(data, choose_box, out)
        else:
            self._load_other(data, choose_box, out)

    def _load_jpeg(self, data: bytes, choose_box: Callable[[int, int], Box], out: np.ndarray) -> None:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError(str(error)) from error
        if colours in ("CMYK", "YCCK"):
            self._load_other(data, choose_box, out)
            return
        if height * width > _MAX_PIXELS:
            raise DecodeError(f"{width} x {height} pixels are more than {_MAX_PIXELS:,}")
        box = choose_box(width, height)
        if self.backend == "region" and self.channels == 3:
            self._region = self._region or _RegionDecoder()
            self._resize(self._region.decode(data, box), out)
            return
        try:
            pixels = simplejpeg.decode_jpeg(
                data, colorspace="RGB" if self.channels == 3 else "GRAY", strict=True
            )
        except ValueError as error:
            raise DecodeError(str(error)) from error
        left, top, right, bottom = box
        self._resize(pixels[top:bottom, left:right], out)

    def _load_other(self, data: bytes, choose_box: Callable[[int, int], Box], out: np.ndarray) -> None:
        try:
            image = Image.open(io.BytesIO(data))
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("L" if self.channels == 1 else "RGB")
        # What PIL raises for damaged files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DecodeError(str(error)) from error
        left, top, right, bottom = choose_box(*image.size)
        pixels = np.asarray(image)
        self._resize((pixels[:, :, None] if pixels.ndim == 2 else pixels)[top:bottom, left:right], out)

    def _resize(self, pixels: np.ndarray, out: np.ndarray) -> None:
        if pixels.shape == out.shape:
            out[:] = pixels
            return
        if not self.antialias:  # opencv: 0.15 ms where torch takes 0.45 ms
            out[:] = _opencv().resize(pixels, (self.size, self.size)).reshape(out.shape)
            return
        if not pixels.flags.writeable:  # torch warns about PIL's read-only arrays
            pixels = pixels.copy()
        crop = torch.from_numpy(pixels).permute(2, 0, 1)[
            None
        ]  # channels last, as torch's uint8 kernels want it
        resized = torch.nn.functional.interpolate(
            crop, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )
        out[:] = resized[0].permute(1, 2, 0).numpy()


@functools.cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)  # a worker process is the unit of parallelism
    return cv2


class _RegionDecoder:
    """nvImageCodec on the CPU, one thread: skips the colour conversion and most of the DCT outside the
    crop."""

    def __init__(self) -> None:
        codec = self.require()
        self._codec = codec
        self._decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.CPU_ONLY)],
        )
        self._parameters = codec.DecodeParams(apply_exif_orientation=False)

    @staticmethod
    def require() -> Any:
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise ValueError(
                "--data.decoder region needs nvImageCodec: pip install nvidia-nvimgcodec-cu13, "
                "or use --data.decoder full"
            ) from error
        return nvimgcodec

    def decode(self, data: bytes, box: Box) -> np.ndarray:
        """RGB uint8 [h, w, 3] of `box`."""
        left, top, right, bottom = box
        region = self._codec.Region(top, left, bottom, right)
        stream = self._codec.CodeStream(data).get_sub_code_stream(region=region)
        image = self._decoder.decode(stream, params=self._parameters)
        if image is None:
            raise DecodeError("nvImageCodec cannot decode it")
        return np.asarray(image.cpu())
