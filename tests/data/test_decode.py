"""From bytes to rows of a batch."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from megavit.data.decode import Box, DecodeError, Decoder
from megavit.data.exif import orientation

SIZE = 32
BACKENDS = [
    "full",
    pytest.param(
        "region",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("nvidia") is None
            or importlib.util.find_spec("nvidia.nvimgcodec") is None,
            reason="nvidia-nvimgcodec-cu13 is not installed",
        ),
    ),
]
ANTIALIAS = [
    True,
    pytest.param(
        False,
        marks=pytest.mark.skipif(
            importlib.util.find_spec("cv2") is None, reason="opencv-python-headless is not installed"
        ),
    ),
]


def photo(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    """Waves of several lengths and a little noise: smooth like a photograph, different at every place."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [
        128 + sum(50 / k * np.sin(x * k / 17 + y * k / 23 + rng.uniform(0, 6)) for k in (1, 2, 4))
        for _ in range(3)
    ]
    pixels = np.stack(planes, axis=2) + rng.normal(0, 3, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(data: bytes, box: Box | None = None, size: int = SIZE, channels: int = 3, **settings) -> np.ndarray:
    """The decoded row; the neighbouring rows of the batch must stay as they were."""
    batch = np.full((3, size, size, channels), 77, np.uint8)
    decoder = Decoder(channels, size, **settings)
    decoder.load(data, lambda width, height: box or (0, 0, width, height), batch[1])
    assert (batch[[0, 2]] == 77).all()
    return batch[1]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


KINDS = [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")]
KINDS += [("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [("WEBP", mode) for mode in ("RGB", "RGBA")]


@pytest.mark.parametrize("antialias", ANTIALIAS)
@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_every_kind_of_file_becomes_rgb_and_grey(kind: str, mode: str, antialias: bool) -> None:
    """Catches a palette, alpha, CMYK or 16-bit file that comes out inverted, empty or with other channels."""
    image = Image.new("I;16", (40, 30), 30_000) if mode == "I;16" else photo(40, 30).convert(mode)
    data = encode(image, kind)
    for channels, name in ((3, "RGB"), (1, "L")):
        shown = Image.new("L", (40, 30), 30_000 >> 8) if mode == "I;16" else Image.open(io.BytesIO(data))
        expected = np.asarray(shown.convert(name)).reshape(30, 40, channels)
        exact = load(data, (3, 2, 11, 10), size=8, channels=channels, antialias=antialias)
        assert np.abs(exact.astype(int) - expected[2:10, 3:11]).max() <= 1
        resized = load(data, channels=channels, antialias=antialias)
        assert abs(resized.mean() - expected.mean()) < 3


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS", "PPM", "ICO", "JPEG2000", "PDF"])
def test_other_formats_are_not_opened(kind: str) -> None:
    """Catches Ghostscript run on an EPS file that is called .jpg, and 40 decoders that nobody asked for."""
    with pytest.raises(DecodeError, match=r"not an image of a known format \(JPEG, PNG, WEBP\)"):
        load(encode(photo(40, 30), kind))


def test_sixteen_bit_images_keep_their_shades() -> None:
    """Catches 16-bit PNGs clipped to white."""
    assert (load(encode(Image.new("I;16", (9, 9), 30_000), "PNG"), channels=1) == 30_000 >> 8).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_of_the_output_size_is_copied_exactly(backend: str) -> None:
    """Catches a resampling filter, an offset of a pixel or another decoder where nothing is to be resized."""
    box = (37, 21, 37 + SIZE, 21 + SIZE)
    png = load(encode(photo(), "PNG"), box, backend=backend)
    assert np.array_equal(png, np.asarray(photo())[21 : 21 + SIZE, 37 : 37 + SIZE])
    jpeg = encode(photo())
    for channels, colors in ((3, "RGB"), (1, "GRAY")):
        expected = simplejpeg.decode_jpeg(jpeg, colors)[21 : 21 + SIZE, 37 : 37 + SIZE]
        assert np.array_equal(load(jpeg, box, channels=channels, backend=backend), expected)


BOXES = [(0, 0, 160, 120), (13, 7, 150, 119), (5, 50, 125, 70), (70, 3, 81, 16), (159, 119, 160, 120)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", BOXES)
def test_antialias_is_pillows(box: Box, channels: int) -> None:
    """Catches a resize without antialias, in the wrong memory order, or with shifted pixel centres."""
    data = encode(photo())
    image = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
    expected = np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert psnr(load(data, box, channels=channels), expected.reshape(SIZE, SIZE, channels)) > 50


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", BOXES)
def test_without_antialias_is_plain_bilinear(box: Box, channels: int) -> None:
    """Catches another filter, swapped axes, and a result that never reaches the batch."""
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    data = encode(photo())
    left, top, right, bottom = box
    crop = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")[top:bottom, left:right]
    planes = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear")[0].permute(1, 2, 0)
    assert psnr(load(data, box, channels=channels, antialias=False), expected.numpy()) > 50


@pytest.mark.parametrize("antialias", ANTIALIAS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_box_is_the_box(kind: str, antialias: bool) -> None:
    """Catches rows taken for columns, and width taken for height in what the box is chosen from."""
    corners = np.zeros((64, 96, 3), np.uint8)  # 96 wide
    corners[:32, 48:], corners[32:, :48], corners[32:, 48:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    data = encode(
        Image.fromarray(corners), kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {})
    )
    seen = []
    for box, color in (
        ((0, 0, 48, 32), (0, 0, 0)),
        ((48, 0, 96, 32), (255, 0, 0)),
        ((0, 32, 48, 64), (0, 255, 0)),
        ((48, 32, 96, 64), (0, 0, 255)),
    ):
        row = np.empty((16, 16, 3), np.uint8)
        choose = lambda width, height, box=box: seen.append((width, height)) or box  # noqa: E731
        Decoder(3, 16, antialias).load(data, choose, row)
        assert np.abs(row.astype(int) - color).max() <= 8
    assert seen == [(96, 64)] * 4


@pytest.mark.parametrize("antialias", ANTIALIAS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 8), (3, 200), (200, 1)])
def test_tiny_and_thin_images_are_enlarged(kind: str, width: int, height: int, antialias: bool) -> None:
    """Catches a decoder or a resize that needs a whole block or more than one row."""
    data = encode(Image.new("RGB", (width, height), (200, 100, 50)), kind)
    assert np.abs(load(data, antialias=antialias).astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_flavour_of_jpeg_gives_the_box_of_the_whole(backend: str) -> None:
    """Catches chroma interpolated differently at the border of a region, and flavours a decoder cannot do."""
    image, rng = photo(157, 119), np.random.default_rng(0)  # odd sides: the last blocks are incomplete
    flavours = [{"subsampling": s} for s in (0, 1, 2)]
    flavours += [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_rows": 1}]
    for options in flavours:
        data = encode(image, **options)
        for channels, colors in ((3, "RGB"), (1, "GRAY")):
            whole = simplejpeg.decode_jpeg(data, colors)
            for _ in range(20):
                size = int(rng.integers(1, 100))
                left, top = int(rng.integers(0, 158 - size)), int(rng.integers(0, 120 - size))
                row = load(data, (left, top, left + size, top + size), size, channels, backend=backend)
                assert np.array_equal(row, whole[top : top + size, left : left + size]), (options, left, top)


def with_orientation(image: Image.Image, turn: int, kind: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0132] = "a camera", turn, "2026:01:01 00:00:00"
    return encode(image, kind, exif=exif, **options)


def exif_last(png: bytes) -> bytes:
    """The eXIf chunk behind the pixels, as some programs write it."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "CMYK", "PNG, last"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_shown_upright(turn: int, kind: str, backend: str) -> None:
    """Catches pictures on their side, mirrored or turned the wrong way, and boxes of the picture as it was
    stored."""
    image = photo(150, 100).convert("CMYK") if kind == "CMYK" else photo(150, 100)
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    data = with_orientation(image, turn, "JPEG" if kind == "CMYK" else kind.split(",")[0], **options)
    data = exif_last(data) if kind.endswith("last") else data
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    upright = np.asarray(ImageOps.exif_transpose(with_tag(stored, turn)))
    seen: list[tuple[int, int]] = []
    for box in ((10, 20, 42, 52), (50, 60, 82, 92), (3, 4, 90, 80)):
        row = np.empty((SIZE, SIZE, 3), np.uint8)
        choose = lambda width, height, box=box: seen.append((width, height)) or box  # noqa: E731
        Decoder(3, SIZE, backend=backend).load(data, choose, row)
        crop = Image.fromarray(upright).crop(box)
        assert psnr(row, np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))) > 38
    assert seen == [(upright.shape[1], upright.shape[0])] * 3
    with pytest.raises(DecodeError, match=f"{upright.shape[1]}x{upright.shape[0]} pixels are more than"):
        load(data, backend=backend, max_pixels=14_999)


def with_tag(pixels: np.ndarray, turn: int) -> Image.Image:
    """An image in memory that Pillow's own `exif_transpose` turns."""
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = turn
    return image


def test_an_orientation_that_cannot_be_read_is_none() -> None:
    """Catches a damaged tag that makes a good picture a bad one, and a search without end."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = with_orientation(photo(40, 30), 6, kind)
        assert orientation(data) == 6
        for end in range(len(data)):
            assert orientation(data[:end]) in (1, 6)
        start = data.index(b"a camera") - 60
        for _ in range(2000):
            bad = bytearray(data)
            for place in rng.integers(max(0, start), min(len(data), start + 120), 4):
                bad[place] = rng.integers(256)
            assert 1 <= orientation(bytes(bad)) <= 8
    for tag in (0, 9, 600):
        assert orientation(with_orientation(photo(40, 30), tag, "JPEG")) == 1


def damaged(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    start = data.index(b"\xff\xda") + 20  # past the header, in the compressed pixels
    bad = bytearray(data)
    if kind == "truncated":
        return data[: rng.integers(start, len(data) - 100)]
    if kind == "zeroed":
        place = rng.integers(start, len(data) - 512)
        bad[place : place + 512] = bytes(512)
    else:
        bad[rng.integers(start, len(data) - 2)] ^= 1 << rng.integers(8)
    return bytes(bad)


@pytest.mark.parametrize(("kind", "share"), [("flipped", 0.05), ("zeroed", 0.75), ("truncated", 1.0)])
def test_damaged_jpegs_are_found(kind: str, share: float) -> None:
    """Catches a lenient decoder, which trains on garbage without a word."""
    data, rng, found = encode(photo(400, 300), quality=90), np.random.default_rng(0), 0
    for _ in range(150):
        try:
            load(damaged(kind, data, rng))
        except DecodeError:
            found += 1
    assert found >= share * 150


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_files_are_found_outside_the_box_as_well(backend: str) -> None:
    """Catches a region decoder that never reads to the missing end."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo(), kind)
        for end in rng.integers(1, len(data) - 20, 20):
            with pytest.raises(DecodeError):
                load(data[:end], (0, 0, 8, 8), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arbitrary_damage_only_ever_raises_decode_error(backend: str) -> None:
    """Catches exceptions of the libraries that get past a handler for bad samples, and crashes."""
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo(48, 40), kind)
        for _ in range(100):
            bad = bytearray(data)
            for place in rng.integers(0, min(len(data), 700), 4):
                bad[place] = rng.integers(256)
            try:
                load(bytes(bad), (0, 0, 1, 1), backend=backend)
            except (DecodeError, ValueError) as error:
                assert type(error) is DecodeError or "not inside" in str(error)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF", b"\x89PNG\r\n\x1a\n", b"no image" * 99]
)
def test_garbage_is_refused_with_a_reason(data: bytes) -> None:
    """Catches messages that are empty or differ from run to run by an address."""
    with pytest.raises(DecodeError) as caught:
        load(data)
    assert 5 < len(str(caught.value)) < 120 and "0x" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_absurd_sizes_are_refused_before_memory_is_taken(kind: str, backend: str) -> None:
    """Catches a header of a few bytes that makes a worker allocate gigabytes."""
    data = bytearray(encode(photo(16, 16), kind))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", 65_000, 65_000)
    else:
        chunk = data[12:16] + struct.pack(">II", 65_000, 65_000) + data[24:29]
        data[12:33] = chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(DecodeError, match="--data.max_pixels"):
        load(bytes(data), (0, 0, 8, 8), backend=backend)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_pixel_limit_is_that_of_the_header(kind: str) -> None:
    """Catches a tiny file that takes gigabytes: 13,000 x 13,000 pixels of one colour are a PNG of 500 kB, and
    took 3.4 GB."""
    data = encode(Image.new("RGB", (300, 200)), kind)
    load(data, max_pixels=60_000)
    with pytest.raises(DecodeError, match="300x200 pixels are more than --data.max_pixels 59999"):
        load(data, max_pixels=59_999)
    # CMYK leaves simplejpeg for Pillow behind its header.
    with pytest.raises(DecodeError, match="--data.max_pixels"):
        load(encode(Image.new("CMYK", (300, 200))), max_pixels=59_999)


def test_memory_stays_small_when_an_image_is_too_large() -> None:
    """Catches a limit that is checked when the memory is taken already."""
    files = {kind: encode(Image.new("L", (8_000, 8_000)), kind) for kind in ("JPEG", "PNG", "WEBP")}
    for kind, data in files.items():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = peak_kb()
        with pytest.raises(DecodeError, match="8000x8000 pixels are more than --data.max_pixels 50000000"):
            load(data)
        assert peak_kb() - before < 20_000, kind  # decoding takes 200,000 to 1,000,000


def peak_kb() -> int:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("box", [(0, 0, 161, 120), (-1, 0, 5, 5), (5, 5, 5, 9)])
def test_boxes_outside_the_image_are_a_mistake_of_the_caller(kind: str, box: Box) -> None:
    """Catches black borders or squeezed crops from a wrong box, and a wrong box counted as a bad sample."""
    with pytest.raises(ValueError, match="not inside the image of 160x120") as caught:
        load(encode(photo(), kind), box)
    assert not isinstance(caught.value, DecodeError)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_used_decoder_can_be_pickled(backend: str) -> None:
    """Catches native handles kept in the object: DataLoader could not send it to its workers."""
    decoder, rows, data = (
        Decoder(3, SIZE, backend=backend),
        np.empty((2, SIZE, SIZE, 3), np.uint8),
        encode(photo()),
    )
    for row in rows:
        decoder.load(data, lambda width, height: (0, 0, width, height), row)
        decoder = pickle.loads(pickle.dumps(decoder))
    assert np.array_equal(*rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow(backend: str) -> None:
    """Catches a native buffer that is not freed, on success and on failure."""
    good = encode(photo(400, 300))
    bad = good[: len(good) // 2]

    def decode_many(times: int) -> None:
        row = np.empty((SIZE, SIZE, 3), np.uint8)
        decoder = Decoder(3, SIZE, backend=backend)
        for number in range(times):
            try:
                decoder.load(bad if number % 4 == 0 else good, lambda w, h: (7, 5, w, h - 9), row)
            except DecodeError:
                assert number % 4 == 0

    decode_many(100)
    before = psutil.Process().memory_info().rss
    decode_many(1500)  # 540 MB of pixels
    assert psutil.Process().memory_info().rss - before < 30 << 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 4}, "channels is 4"),
        ({"size": 0}, "size is 0"),
        ({"backend": "gpu"}, "'full' or 'region'"),
    ],
)
def test_wrong_settings_fail_at_construction(settings: dict, message: str) -> None:
    """Catches a setting that only fails in a worker, on the first image."""
    with pytest.raises(ValueError, match=message):
        Decoder(**({"channels": 3, "size": SIZE} | settings))
