"""Decoding: every kind of file, exact pixels where nothing is resized, and damage that is noticed."""

from __future__ import annotations

import importlib.util
import io
import pickle

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from megavit.data.decode import Box, DecodeError, Decoder


def photo(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth colours, edges and noise: what JPEG is made for."""
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(low) * 0.9 + rng.integers(0, 25, (height, width, 3))).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(width: int, height: int) -> Box:
    return 0, 0, width, height


def load(data: bytes, size: int, box: Box | None = None, channels: int = 3, **options: object) -> np.ndarray:
    out = np.zeros((size, size, channels), np.uint8)
    Decoder(channels, size, **options).load(data, lambda w, h: box or whole(w, h), out)
    return out


KINDS = [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")]
KINDS += [("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [("WEBP", mode) for mode in ("RGB", "RGBA")]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
@pytest.mark.parametrize("antialias", [True, False])
def test_every_kind_of_file_becomes_rgb_or_grey(kind: str, mode: str, antialias: bool) -> None:
    """Catches a palette, alpha, CMYK or 16-bit file that changes the number of channels."""
    image = Image.new("I;16", (40, 30), 30_000) if mode == "I;16" else photo().convert(mode)
    for channels in (1, 3):
        assert (
            load(encoded(image, kind), 8, channels=channels, antialias=antialias).std() > 0 or mode == "I;16"
        )


def test_sixteen_bit_images_keep_their_shades() -> None:
    """Catches 16-bit PNGs clipped to white."""
    assert (load(encoded(Image.new("I;16", (9, 9), 30_000), "PNG"), 9, channels=1) == 30_000 >> 8).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_crops_of_the_right_size_are_copied(options: dict[str, object]) -> None:
    """Catches a box that is shifted, transposed or resized for nothing."""
    png, jpeg = encoded(photo(), "PNG"), encoded(photo(), "JPEG", quality=90, **options)
    box = (31, 17, 31 + 64, 17 + 64)
    assert np.array_equal(load(png, 64, box), np.asarray(photo())[17:81, 31:95])
    assert np.array_equal(load(jpeg, 64, box), simplejpeg.decode_jpeg(jpeg)[17:81, 31:95])


@pytest.mark.parametrize(
    ("size", "box"), [(32, (10, 20, 190, 140)), (224, (40, 30, 90, 70)), (64, (0, 0, 200, 150))]
)
def test_resizing_agrees_with_pil(size: int, box: Box) -> None:
    """Catches another filter or pixel grid: 50 dB against PIL's antialiased bilinear."""
    expected = np.asarray(photo().resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(float)
    error = (load(encoded(photo(), "PNG"), size, box) - expected) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 50
    if size == 224:  # upsampling needs no antialiasing: both ways agree
        plain = load(encoded(photo(), "PNG"), size, box, antialias=False).astype(float)
        assert 10 * np.log10(255**2 / ((plain - expected) ** 2).mean()) > 45


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_garbage_is_an_error(data: bytes) -> None:
    """Catches a crash, or black images, for what is no image."""
    with pytest.raises(DecodeError):
        load(data, 8)


def test_damage_that_pil_swallows_is_an_error() -> None:
    """Catches a lenient decoder: of images with 512 zeroed bytes most must be found, of cut-off ones all."""
    data = encoded(photo(400, 300), "JPEG", quality=90)
    rng, found = np.random.default_rng(0), 0
    for _ in range(20):
        start = int(rng.integers(len(data) // 4, len(data) - 600))
        try:
            load(data[:start] + bytes(512) + data[start + 512 :], 32)
        except DecodeError:
            found += 1
        for kind in ("JPEG", "PNG"):
            cut = encoded(photo(), kind)
            with pytest.raises(DecodeError):
                load(cut[: int(len(cut) * rng.uniform(0.1, 0.9))], 32)
    assert found >= 12


def test_huge_headers_are_refused_before_memory_is_taken() -> None:
    """Catches 5 GB allocated for a few damaged bytes."""
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\x9c\x40\x9c\x40"
    with pytest.raises(DecodeError, match="40000 x 40000 pixels"):
        load(bytes(data), 8)


@pytest.mark.skipif(not importlib.util.find_spec("nvidia.nvimgcodec"), reason="needs nvidia-nvimgcodec-cu13")
def test_region_decoding_gives_the_same_pixels() -> None:
    """Catches chroma that is off by one at odd crop borders."""
    data = encoded(photo(), "JPEG", quality=90)
    for box in ((31, 17, 95, 81), (0, 0, 64, 64), (136, 86, 200, 150)):
        assert np.array_equal(load(data, 64, box, backend="region"), load(data, 64, box))
    decoder = pickle.loads(pickle.dumps(Decoder(3, 8, backend="region")))
    decoder.load(data, whole, np.zeros((8, 8, 3), np.uint8))
