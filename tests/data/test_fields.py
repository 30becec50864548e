"""Samples of several fields: written as real shards, read in one geometry, bad ones filled."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from megavit.data.config import DataConfig
from megavit.data.device import mirror, to_model_input
from megavit.data.fields import Batch, Field, FloatPicture, Labels, Number, Picture, Plane
from megavit.data.loader import EvalLoader, Share, TrainLoader
from megavit.data.manifest import open_shards

SIZE, CLASSES = 64, (0, 3, 7, 200)
CONFIG = DataConfig(workers=0, crop_area=(0.2, 1.0), rotate_degrees=25.0, shift=0.1, zoom=0.2, lanes=4)
STILL = dataclasses.replace(CONFIG, augment="none", rotate_degrees=0.0, shift=0.0, zoom=0.0, flip=False)

IMAGE = Picture(size=SIZE)
DEPTH = Plane("depth", ("depth.png",), size=SIZE, fill=-1, invalid=0, scale=1 / 256)
PLACE = Plane("place", ("place.npy",), size=SIZE, channels=2, fill=-1)
MASK = Plane("mask", ("mask.png",), size=SIZE, dtype="uint8", fill=255)
COLORS = Plane("colors", ("colors.png",), size=SIZE, channels=3, dtype="int32", fill=-1)
BANDS = FloatPicture("bands", ("bands.npy",), size=SIZE, channels=5, fill=-2)
AGE = Number("age", "age", fill=-1)
FIELDS = (IMAGE, DEPTH, PLACE, MASK, COLORS, BANDS, AGE, Labels(num_classes=10, max_labels=3))


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def png16(values: np.ndarray) -> bytes:
    found, data = cv2.imencode(".png", values[..., ::-1] if values.ndim == 3 else values)
    assert found
    return data.tobytes()


def sample(number: int, width: int = 200, height: int = 150) -> dict[str, bytes]:
    """A sample whose picture and planes all say where their pixels are, in the source's units."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    depth = rng.integers(1, 2**16, (height, width), dtype=np.uint16)
    depth[rng.random(depth.shape) < 0.3] = 0
    mask = Image.fromarray(rng.choice(np.array(CLASSES, np.uint8), (height, width)), "P")
    mask.putpalette(bytes(rng.integers(0, 256, 768, dtype=np.uint8)))
    return {
        "png": encode(Image.fromarray(np.stack([x, y, x * 0 + 255], 2).astype(np.uint8))),
        "depth.png": encode(Image.fromarray(depth)),
        "place.npy": npy(np.stack([x, y], 2).astype(np.float32)),
        "mask.png": encode(mask),
        "colors.png": png16(np.stack([x * 256, y * 256 + 1, depth], 2).astype(np.uint16)),
        "bands.npy": npy(np.stack([x, y, x + y, x - y, x * 0 + 1000], 2).astype(np.int16)),
        "json": json.dumps({"labels": [number % 10], "age": number + 0.5}).encode(),
    }


def write(folder: Path, samples: Sequence[dict[str, bytes]]) -> str:
    with wds.TarWriter(str(folder / "x.tar"), encoder=False, mtime=0) as tar:
        for number, members in enumerate(samples):
            tar.write({"__key__": f"{number:04}", **members})
    return str(folder / "x.tar")


def training(shards: str, fields: Sequence[Field], config: DataConfig = CONFIG, **options: object) -> Batch:
    sizes = {"seed": 3, "global_batch": 8, "micro_batch": 8} | options
    (batch,) = list(TrainLoader(open_shards(shards), fields, config, **sizes).batches(0, 1))
    return batch


def evaluation(shards: str, fields: Sequence[Field], config: DataConfig = CONFIG) -> Batch:
    (batch,) = list(EvalLoader(open_shards(shards), fields, config, batch=8))
    return batch


def on_device(batch: Batch) -> dict[str, np.ndarray]:
    """The fields as a model sees them, mirrored."""
    assert batch.weights.all(), batch.bad
    spatial = [field.name for field in FIELDS if field.is_spatial and field.name in batch.fields]
    return {name: mirror(batch.fields[name], batch.flips).numpy() for name in spatial}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("fields"), [sample(number) for number in range(8)])


@pytest.mark.parametrize("load", [training, evaluation])
def test_all_fields_of_a_sample_show_the_same_place(shards: str, load: Callable[..., Batch]) -> None:
    """Catches a plane cropped, turned or mirrored otherwise than its picture, or half a pixel beside it."""
    batch = load(shards, FIELDS)
    found = on_device(batch)
    if load is training:
        assert 0 < batch.flips.sum() < 8 and 0.01 < (found["place"] == -1).mean() < 0.5
    for number in range(8):
        image, place = found["image"][number].astype(float), found["place"][number]
        outside = (place == -1).all(2)
        # Blue is 255 everywhere in the picture, and black only beyond its border.
        assert np.array_equal(outside, image[:, :, 2] == 0)
        inside = ~outside
        x, y = place[inside].T
        colors = found["colors"][number]
        assert (colors[outside] == -1).all()
        assert np.array_equal(colors[inside][:, :2], np.stack([x * 256, y * 256 + 1], 1))
        bands = found["bands"][number]
        assert np.array_equal((bands == -2).all(2), outside)
        # Resizing rounds, and Pillow cuts off what is behind the point when it moves a picture of 8 bits.
        assert np.abs(bands[inside][:, :2] - image[inside][:, :2]).max() < 1.51
        error = place[inside] - bands[inside][:, :2]
        assert np.abs(error.mean(0)).max() < 0.1 and np.abs(error).mean() < 0.8 and np.abs(error).max() < 3
        assert np.allclose(bands[inside][:, 2], bands[inside][:, :2].sum(1), atol=1e-2)


@pytest.mark.parametrize("load", [training, evaluation])
def test_planes_hold_stored_values_only(shards: str, load: Callable[..., Batch]) -> None:
    """Catches classes that lie between two others, depth averaged with pixels that have none, and the colours
    of a palette taken for its classes."""
    batch = load(shards, FIELDS)
    found = on_device(batch)
    assert set(np.unique(found["mask"])) <= {*CLASSES, 255}
    ages = batch.fields["age"].tolist()
    assert sorted(ages) == [number + 0.5 for number in range(8)]
    for row, age in enumerate(ages):
        members = sample(int(age))
        stored = np.asarray(Image.open(io.BytesIO(members["depth.png"]))) / np.float32(256)
        classes = np.asarray(Image.open(io.BytesIO(members["mask.png"])))
        depth, mask, place = (found[name][row] for name in ("depth", "mask", "place"))
        inside = (place >= 0).all(2)
        x, y = place[inside].T.astype(int)
        assert np.array_equal(depth[inside], np.where(stored[y, x] == 0, -1, stored[y, x]))
        assert 0.2 < (depth[inside] == -1).mean() < 0.4 and (depth[~inside] == -1).all()
        assert np.array_equal(mask[inside], classes[y, x]) and (mask[~inside] == 255).all()


def test_a_tensor_parallel_group_shares_every_field(shards: str) -> None:
    """Catches fields that are not cut as the picture, and padding that is not the fill value."""
    whole = training(shards, FIELDS)
    parts = [training(shards, FIELDS, share=Share(tp_rank=rank, tp_size=3)) for rank in range(3)]
    for field in FIELDS:
        together = torch.cat([part.fields[field.name] for part in parts])
        assert torch.equal(together[:8], whole.fields[field.name])
        assert together.shape == (9, *field.shape) and (together[8] == field.fill).all()


def test_the_way_a_number_is_stored_changes_nothing(tmp_path: Path) -> None:
    """Catches byte orders, memory orders and bit depths read as something else."""
    values = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE))
    grey = np.uint8(values)
    ways = {
        "a.npy": npy(np.asfortranarray(values)),
        "b.npy": npy(values.astype(">i2")[:, :, None]),
        "c.npy": npy(values.astype(bool)),
        "d.npy": npy(values.astype(np.float16)),
        "e.png": encode(Image.fromarray(grey)),
        "f.png": encode(Image.fromarray(grey * 255).convert("1")),
        "g.png": encode(Image.fromarray(grey, "P"), bits=4),
        "h.png": encode(Image.fromarray(values.astype(np.uint16))),
        "i.png": four_bits(grey),
    }
    image = encode(Image.fromarray(grey))
    planes = [Plane(name, (name,), size=SIZE, dtype="int32") for name in ways]
    shards = write(tmp_path, [{"png": image, **ways}])
    whole = dataclasses.replace(STILL, eval_crop=1.0)
    (batch,) = list(EvalLoader(open_shards(shards), [IMAGE, *planes], whole, batch=1))
    assert not batch.bad
    for name in ways:
        assert np.array_equal(batch.fields[name][0], values), name


def four_bits(values: np.ndarray) -> bytes:
    """A grey PNG of 4 bits, which Pillow reads and does not write."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    rows = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_depth_that_is_not_finite_is_filled(tmp_path: Path) -> None:
    """Catches NaN and infinity, as sensors write them, that reach a loss."""
    depth = np.full((SIZE, SIZE), 2.5, np.float32)
    depth[0], depth[1], depth[2] = np.nan, np.inf, -np.inf
    members = {"png": encode(Image.new("L", (SIZE, SIZE))), "depth.npy": npy(depth)}
    plane = Plane("depth", ("depth.npy", "depth.png"), size=SIZE, fill=-1)
    batch = evaluation(write(tmp_path, [members]), [IMAGE, plane], dataclasses.replace(STILL, eval_crop=1.0))
    assert (batch.fields["depth"][0, :3] == -1).all() and (batch.fields["depth"][0, 3:] == 2.5).all()


def test_planes_lie_on_the_upright_picture(tmp_path: Path) -> None:
    """Catches planes compared with the picture as it was stored, on its side."""
    members = sample(0)
    upright = Image.open(io.BytesIO(members["png"]))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: stored turned the other way
    members["png"] = encode(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    plain = training(write(tmp_path, [sample(0)] * 8), FIELDS)
    turned = training(write(tmp_path, [members] * 8), FIELDS)
    assert not turned.bad
    for field in FIELDS:
        assert torch.equal(turned.fields[field.name], plain.fields[field.name]), field.name


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("png", b"no image", "it cannot be decoded: not an image"),
        ("png", None, "but no jpg or jpeg or png or webp"),
        ("depth.png", png16(np.zeros((150, 200), np.uint16))[:60], "its depth.png cannot be decoded"),
        ("depth.png", None, "but no depth.png"),
        (
            "place.npy",
            npy(np.zeros((150, 201, 2))),
            "has 201x150 pixels, but its picture 200x150",
        ),
        ("colors.png", png16(np.zeros((150, 200, 3), np.uint16))[:90], "its colors.png cannot be decoded"),
        ("colors.png", png16(np.zeros((150, 200, 4), np.uint16)), "its colors.png has 4 channels, not 3"),
        ("bands.npy", npy(np.full((150, 200, 5), np.nan)), "its bands.npy has values that are not finite"),
        ("bands.npy", npy(np.zeros((200, 150, 5))), "its bands.npy has 150x200 pixels"),
        ("json", b'{"labels": [1]}', "its json has no 'age'"),
        ("json", b'{"labels": [10], "age": 1}', "label 10 is outside"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_member_fills_every_field(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    """Catches a bad sample whose other fields train, and one that ends the run."""
    members = {key: value for key, value in (sample(1) | {name: data}).items() if value is not None}
    shards = write(tmp_path, [*(sample(number) for number in range(7)), members])
    batch = training(shards, FIELDS)
    (bad,) = batch.bad
    assert bad.key == "0007" and words in bad.reason
    assert sorted(batch.weights.tolist()) == [0.0] + [1.0] * 7
    row = int(batch.weights.argmin())
    for field in FIELDS:
        values = batch.fields[field.name]
        assert values.shape == (8, *field.shape) and (values[row] == field.fill).all(), field.name
        assert str(values.dtype) == f"torch.{field.dtype}" and (values != field.fill).any()


OWN = '''
from dataclasses import dataclass

import numpy as np

from megavit.data.fields import Field


@dataclass(frozen=True)
class Caption(Field):
    """The first bytes of a text."""

    def decode(self, data, extension, geometry, out):
        if not data:
            raise ValueError(f"its {extension} is empty")
        text = np.frombuffer(data, np.uint8)[: len(out)]
        out[: len(text)] = text
        out[-1] = geometry.width
'''


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 1])
def test_a_field_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Catches a field that worker processes cannot import, or do not call."""
    (tmp_path / "own_caption.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_caption", raising=False)
    caption = importlib.import_module("own_caption").Caption("caption", ("txt",), (6,), "int32", -1)
    texts = [b"cat", b"", b"a long text", b"dog"]
    shards = write(tmp_path, [sample(0) | {"txt": text} for text in texts])
    config = dataclasses.replace(STILL, workers=workers)
    batch = training(shards, [IMAGE, caption], config, global_batch=4, micro_batch=4)
    expected = [[99, 97, 116, -1, -1, 200], [-1] * 6, [*b"a lon", 200], [100, 111, 103, -1, -1, 200]]
    assert sorted(batch.fields["caption"].tolist()) == sorted(expected)
    assert [bad.reason for bad in batch.bad] == ["its txt is empty"]


def test_fields_that_make_no_sense_are_refused(shards: str) -> None:
    """Catches a declaration that only fails in a worker, or for every sample."""
    for make, words in (
        (
            lambda: Plane("mask", ("mask.jpg",), size=8),
            r"reads png and npy, such as 'depth\.png', not 'mask\.jpg'",
        ),
        (lambda: Plane("mask", "png", size=8), "needs a tuple of extensions"),
        (lambda: Plane("mask", ("png",), size=0), r"has shape \[0, 0\]"),
        (
            lambda: Plane("mask", ("png",), size=8, dtype="uint8", fill=-1),
            "filled with -1, which is no uint8",
        ),
        (lambda: Plane("mask", ("png",), size=8, dtype="int32", fill=float("nan")), "which is no int32"),
        (lambda: Plane("mask", ("png",), size=8, dtype="int16"), "dtype 'int16', not one of uint8, "),
        (lambda: Picture(size=8, channels=4), "channels is 4"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    for fields, words in (
        ([AGE], "none of the fields age of a sample is a Picture"),
        ([IMAGE, DEPTH, DEPTH], "two fields of a sample are called 'depth'"),
    ):
        with pytest.raises(ValueError, match=words):
            training(shards, fields)


def test_the_device_mirrors_every_kind_of_field() -> None:
    """Catches a field mirrored upside down, and channels mirrored in place of columns."""
    flips = torch.tensor([True, False])
    plane = torch.arange(18).view(2, 3, 3)
    assert mirror(plane, flips).tolist() == [plane[0].flip(1).tolist(), plane[1].tolist()]
    picture = torch.stack([plane, plane + 100], dim=3)
    assert torch.equal(mirror(picture, flips)[..., 1], mirror(plane, flips) + 100)
    values = torch.randn(2, 3, 3, 5)
    assert torch.equal(to_model_input(values, torch.device("cpu"), flips)[1], values[1].permute(2, 0, 1))
