"""`launch/predict.py` and `megavit.load` with models of depth and segmentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megavit
from megavit.dense_predictor import DensePredictor, largest
from megavit.launch.predict import main
from megavit.launch.predict_maps import depth_scale
from megavit.tasks.config import DepthConfig, InferenceConfig
from tests.data.dense_fixtures import HEIGHT, WIDTH, save_photo
from tests.dense_exports import SEGMENT, write_dense_export
from tests.exports import write_export

NAMES = ("road", "ñandú", "sky")


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_export(tmp_path_factory.mktemp("models") / "depth")


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_export(tmp_path_factory.mktemp("models") / "segment", SEGMENT, NAMES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, width, height in (("a/street.jpg", WIDTH, HEIGHT), ("tall.png", 7, 50), ("b/tiny.png", 1, 1)):
        save_photo(tmp_path / "photos" / name, 1, width, height)
    return tmp_path / "photos"


def test_depth_is_written_with_its_scale(depth: Path, photos: Path, tmp_path: Path) -> None:
    """Catches maps of another size than the photo's, numbers whose unit nobody knows, or that run over."""
    out = tmp_path / "maps"
    assert main([str(depth), str(photos), "--out", str(out), "--color"]) == 0
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert made == sorted(
        f"{name}{end}" for name in ("a/street", "tall", "b/tiny") for end in (".png", ".color.png")
    )
    for name in ("a/street.jpg", "tall.png", "b/tiny.png"):
        expected = megavit.load(depth, device="cpu")(photos / name)[0].numpy()
        with Image.open((out / name).with_suffix(".png")) as image:
            scale, numbers = float(image.text["scale"]), np.asarray(image)
        assert scale == 0.001 and numbers.dtype == np.uint16 and numbers.min() >= 1
        assert numbers.shape == expected.shape
        np.testing.assert_allclose(numbers * scale, expected, atol=0.0005001)
    assert [depth_scale(limit) for limit in (10, 65, 80, 255, 1000)] == [
        0.001,
        0.001,
        1 / 256,
        1 / 256,
        1000 / 65535,
    ]


def test_classes_are_written_with_their_names(
    segment: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a palette without the numbers, names that get lost, and shares that are of other classes."""
    for out in (tmp_path / "map.png", tmp_path / "map.npy"):
        words = [str(segment), str(photos / "a" / "street.jpg"), "--out", str(out), "--json", "--top", "2"]
        assert main(words) == 0
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "P" and json.loads(image.text["classes"]) == list(NAMES)
        classes = np.asarray(image)
        assert len(set(zip(*[iter(image.getpalette()[:9])] * 3, strict=True))) == 3
    (expected,) = megavit.load(segment, device="cpu")([photos / "a" / "street.jpg"])
    assert classes.shape == (HEIGHT, WIDTH) and (classes == expected.numpy()).all()
    assert (np.load(tmp_path / "map.npy") == classes).all()
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    counts = np.bincount(classes.flatten(), minlength=3)
    first = row["classes"][0]
    assert first["class"] == counts.argmax() and first["name"] == NAMES[counts.argmax()]
    assert first["share"] == pytest.approx(counts.max() / classes.size, abs=1e-4)


def test_a_photo_of_the_models_size_is_seen_as_it_is() -> None:
    """Catches the first of equal classes that is not taken, and classes that are mixed up where some are
    looked at at a time."""
    maps = torch.randn(2, 21, 5, 4)
    maps[:, 17] = maps[:, 3]
    assert torch.equal(largest(maps, (5, 4)).long(), maps.argmax(1))
    enlarged = torch.nn.functional.interpolate(maps, (13, 9), mode="bilinear", align_corners=False)
    assert torch.equal(largest(maps, (13, 9)).long(), enlarged.argmax(1))


def test_whole_and_slid_pictures_agree_where_they_must(depth: Path) -> None:
    """Catches pictures that are moved, turned or normalised otherwise than in training, and a scale that is
    not that of the validation."""
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = megavit.load(depth, device="cpu")
    assert isinstance(whole, DensePredictor)
    images = torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = whole.module.metres(images, torch.ones(1))[0]
    torch.testing.assert_close(whole(square)[0], expected)
    slide = megavit.load(depth, device="cpu", inference=InferenceConfig(inference="slide", stride=3))
    torch.testing.assert_close(slide(square)[0], expected)
    mirror = megavit.load(depth, device="cpu", inference=InferenceConfig(mirror=True))
    torch.testing.assert_close(mirror(square[:, ::-1].copy())[0], mirror(square)[0].flip(1))
    assert whole.fit(np.zeros((30, 40, 3), np.uint8)).pixels.shape == (16, 21, 3)
    assert not torch.allclose(slide(np.tile(square, (1, 2, 1)))[0], whole(np.tile(square, (1, 2, 1)))[0])


def test_the_validations_scale(tmp_path: Path) -> None:
    """Catches pictures that are seen smaller than the central squares that the run was evaluated on."""
    model = megavit.load(write_dense_export(tmp_path, crop=0.8), device="cpu", dtype="bf16")
    assert model.fit(np.zeros((40, 80, 3), np.uint8)).pixels.shape == (20, 40, 3)
    assert model.limits == (1e-3, 10.0) and model(np.zeros((9, 12, 3), np.uint8))[0].dtype == torch.float32


def test_mistakes_are_one_line(
    depth: Path, segment: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a photo that is written over, maps of which only the last is kept, options that mean nothing
    to the model, and a photo that ends the command."""
    street, classifier = str(photos / "a" / "street.jpg"), str(write_export(tmp_path / "classifier"))
    save_photo(photos / "b" / "street.png", 2)
    with_out = [str(depth), street, "--out"]
    cases = [
        ([str(depth), street], "say where with --out"),
        ([*with_out, str(tmp_path / "map.jpg")], "a map is written as .png or .npy"),
        ([str(depth), str(photos), "--out", str(tmp_path / "map.png")], "is one file for 4 photos"),
        ([str(depth), str(photos / "tall.png"), "--out", str(photos)], "would write over the photo"),
        (
            [str(depth), street, str(photos / "b" / "street.png"), "--out", str(tmp_path / "maps")],
            "would both be written to",
        ),
        ([*with_out, str(tmp_path / "x.png"), "--inference", "slide", "--stride", "20"], "--stride 20"),
        ([str(segment), street, "--out", str(tmp_path / "x.png"), "--color"], "--color is for depth"),
        (
            [classifier, street, "--out", str(tmp_path / "x.png")],
            "--out is for models of depth or segmentation",
        ),
        ([classifier, street, "--mirror"], "--mirror is for models of depth"),
    ]
    for words, expected in cases:
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1, error
    (photos / "broken.jpg").write_bytes(b"no picture")
    words = [
        str(depth),
        str(photos / "broken.jpg"),
        street,
        str(photos / "none.jpg"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "broken.jpg: not an image" in said.err and "none.jpg: No such file" in said.err
    assert (tmp_path / "o" / "street.png").exists() and said.out.count("\n") == 1
    with pytest.raises(ValueError, match=r"photos\[1\]: "):
        megavit.load(depth, device="cpu")([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 7), np.uint8)])
    with pytest.raises(ValueError, match="inference is for these"):
        megavit.load(classifier, inference=InferenceConfig())
    (depth_copy := tmp_path / "copy").mkdir()
    (depth_copy / "task.json").write_text('{"name": "depth", "colour": 1}')
    with pytest.raises(ValueError, match=r"task\.json does not describe"):
        megavit.load(depth_copy)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["dpt", "bins"])
def test_other_heads_take_pictures_of_any_size(head: str, tmp_path: Path) -> None:
    """Catches a head that knows square pictures only."""
    task = DepthConfig(head=head, head_width=8, max_m=80.0, layers="0" if head == "dpt" else "")
    (found,) = megavit.load(write_dense_export(tmp_path, task), device="cpu")(np.zeros((31, 77, 3), np.uint8))
    assert found.shape == (31, 77) and 0 < found.min() <= found.max() <= 80
