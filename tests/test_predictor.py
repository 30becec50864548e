"""`megavit.load`: a model predicts photos as the run that trained it did."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import megavit
from megavit.data.loader import EvalLoader
from megavit.data.manifest import open_shards
from megavit.data.photos import PhotoReader
from megavit.data.preprocessing import Preprocessing
from megavit.data.write import digits_arrays
from megavit.launch import shards
from megavit.predictor import Predictions, Predictor
from megavit.recipe import read_recipe
from megavit.tasks.task import make_task
from tests.exports import NAMES, write_export
from tests.launch.commands import DEMO, SHORT, again, train, train_with


def noise(seed: int, width: int = 60, height: int = 40, shift: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse).astype(int) + shift).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Predictor:
    return megavit.load(folder, device="cpu")


@pytest.mark.slow
def test_digits_are_predicted_as_the_run_did(digits: Path, tmp_path: Path) -> None:
    """Catches grey images in three channels, a crop of 0.875 where the run had none, a softmax over the
    probabilities of a sigmoid, and names that are lost on the way from the shards to the export."""
    shards_dir = tmp_path / "digits"
    shards_dir.mkdir()
    for file in digits.iterdir():
        (shards_dir / file.name).symlink_to(file)
    (shards_dir / "classes.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    run = train(tmp_path / "run", shards_dir, *SHORT)
    assert run.code == 0, run.output
    _, test = digits_arrays()
    predictor = megavit.load(tmp_path / "run", device="cpu")
    assert predictor.names == tuple(f"digit {i}" for i in range(10))
    found = predictor(list(test.images))
    top1 = np.mean(
        [best[0][0] == f"digit {label}" for best, label in zip(found.top(1), test.labels, strict=True)]
    )
    assert top1 == run.evaluations[-1]["eval/val/top1"] > 0.2
    assert torch.equal(found.probabilities, found.logits.sigmoid())
    # A run that goes on keeps its names, whatever becomes of those beside the shards.
    (shards_dir / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)))
    assert again(run, "--max_steps", "22").code == 0
    assert megavit.load(tmp_path / "run").names == predictor.names


@pytest.mark.slow
def test_photos_are_predicted_as_the_run_did(tmp_path: Path) -> None:
    """Catches another crop, filter, decoder or channel order than those of the run's evaluation."""
    for split, count in (("train", 30), ("val", 40)):
        for label, name in enumerate(NAMES):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            shift = tuple(12 * (channel == label) for channel in range(3))
            for i in range(count):
                image = noise(1000 * label + i + 500 * (split == "val"), 40 + i, 70 - i, shift)
                image.save(tmp_path / "in" / split / name / f"{i}.jpg")
    out = tmp_path / "data"
    words = ["imagefolder", "--root", str(tmp_path / "in"), "--out", str(out), "--workers", "1"]
    assert shards.main(words) == 0
    root = Path(DEMO).parents[2]
    argv = ["--deepspeed_config", str(root / "ds_configs" / "zero3.json"), "--config", DEMO, *SHORT]
    argv += ["--data.shards", f"{out}/train-*.tar", "--data.val_shards", f"{out}/val-*.tar"]
    argv += [
        "--model.channels",
        "3",
        "--model.image_size",
        "32",
        "--model.patch_size",
        "8",
        "--loss",
        "softmax",
    ]
    argv += ["--model.depth", "1", "--data.eval_crop", "0.875", "--ds.train_batch_size", "32"]
    argv += ["--ds.train_micro_batch_size_per_gpu", "32", "--run_dir", str(tmp_path / "run")]
    run = train_with(argv, tmp_path / "run")
    assert run.code == 0, run.output
    predictor = megavit.load(tmp_path / "run", device="cpu", batch_size=17)
    files = sorted((tmp_path / "in" / "val").rglob("*.jpg"))
    found = predictor(files)
    top1 = np.mean([best[0][0] == file.parent.name for best, file in zip(found.top(1), files, strict=True)])
    assert top1 == run.evaluations[-1]["eval/val/top1"]
    assert 0.34 < top1 < 1, "a top-1 that says something"
    assert torch.equal(found.probabilities, found.logits.softmax(1))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_evaluation(tmp_path: Path, channels: int, antialias: bool) -> None:
    """Catches a difference too small to change a top-1."""
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for i in range(8):
        image = noise(i, 90 - 7 * i, 50 + 5 * i)
        image.save(tmp_path / "in" / "cat" / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
    words = ["imagefolder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert shards.main(words) == 0
    run = read_recipe(DEMO)
    data = dataclasses.replace(run.data, eval_crop=0.875, antialias=antialias)
    config = dataclasses.replace(run.model, channels=channels, image_size=32, num_classes=1)
    fields = make_task(run.task, config, data).fields()
    loader = EvalLoader(open_shards(f"{tmp_path}/out/train-*.tar"), fields, data, batch=8)
    (batch,) = list(loader)
    half = (0.5,) * channels
    reader = PhotoReader(Preprocessing(32, channels, 0.875, "bilinear", antialias, half, half, "softmax"))
    mine = [reader.load(path) for path in (tmp_path / "in" / "cat").iterdir()]
    key = lambda row: row.numpy().tobytes()  # noqa: E731
    assert sorted(map(key, mine)) == sorted(map(key, batch.fields["image"]))


def test_every_form_of_a_photo_is_predicted_alike(model: Predictor, tmp_path: Path) -> None:
    """Catches rows taken for channels, colours in another order, and an array that is resized otherwise than
    a file."""
    image = noise(3)
    image.save(tmp_path / "photo.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    alpha = np.concatenate([array, np.full((*array.shape[:2], 1), 7, np.uint8)], 2)
    forms = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        (tmp_path / "photo.png").read_bytes(),
        image,
    ]
    forms += [array, alpha, array / 255, array.astype(np.uint16) * 257, tensor, tensor / 255]
    forms.append(tensor[None])
    expected = model(forms[0])
    assert len(expected.probabilities) == 1 and expected.probabilities.sum() == pytest.approx(1)
    for form in forms:
        assert torch.equal(model(form).logits, expected.logits)
    assert torch.allclose(model(forms[:-1]).logits, expected.logits, atol=1e-5)
    assert torch.allclose(model(torch.stack([tensor] * 3)).logits, expected.logits, atol=1e-5)
    assert len(model(np.stack([array] * 40)).top()) == 40  # more than a batch
    grey = np.asarray(image.convert("L"))
    as_rgb = model(np.stack([grey] * 3, 2)).logits
    for form in (grey, grey[:, :, None], torch.from_numpy(grey.copy()), image.convert("L")):
        assert torch.equal(model(form).logits, as_rgb)


def test_a_pil_image_is_turned_upright(model: Predictor) -> None:
    """Catches a photo from a telephone that is predicted lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left by 90 degrees
    image = noise(4)
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = 6
    expected = model(noise(4).transpose(Image.Transpose.ROTATE_270)).logits
    assert torch.equal(model(image).logits, expected)
    assert not torch.equal(model(noise(4)).logits, expected)


def test_top_names_the_likeliest_classes_first(model: Predictor) -> None:
    """Catches names out of order, and a count that is larger than that of the classes."""
    found = model([noise(0), noise(1)])
    assert found.probabilities.dtype == torch.float32 and found.names == NAMES
    for row, best in zip(found.probabilities, found.top(), strict=True):
        assert [name for name, _ in best] == [NAMES[i] for i in row.argsort(descending=True)]
        assert [value for _, value in best] == sorted(row.tolist(), reverse=True)
    assert [len(best) for best in found.top(2)] == [2, 2]


def test_saturated_probabilities_are_ranked_by_their_logits() -> None:
    """Catches the first class named where the sigmoids of several are 1.0."""
    logits = torch.tensor([[20.0, 40.0, 30.0]])
    found = Predictions(logits, logits.sigmoid(), NAMES)
    assert [name for name, _ in found.top(2)[0]] == ["cat", "ñandú"]


def test_other_statistics_of_the_channels_are_applied(tmp_path: Path, model: Predictor) -> None:
    """Catches an export of other images than in [-1, 1] that is fed with those."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    other = megavit.load(write_export(tmp_path / "x", mean=mean, std=std), device="cpu")
    (row,) = other.prepare([noise(0)])
    images = row.permute(2, 0, 1)[None] / 255
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(other(noise(0)).logits, other.model(images), atol=1e-5)
    assert not torch.allclose(other(noise(0)).logits, model(noise(0)).logits, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_bfloat16_is_close_to_float32(folder: Path, model: Predictor, dtype: Any) -> None:
    """Catches images of another type than the weights."""
    half = megavit.load(folder, device="cpu", dtype=dtype)
    assert half.model.embed.weight.dtype == torch.bfloat16
    found, expected = (m([noise(i) for i in range(8)]).probabilities for m in (half, model))
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05


def test_an_export_without_names_numbers_its_classes(tmp_path: Path) -> None:
    """Catches a missing classes.txt that makes a model useless."""
    assert megavit.load(write_export(tmp_path, names=())).names == ("0", "1", "2")


def change(name: str, value: Any) -> Callable[[Path], object]:
    def harm(folder: Path) -> None:
        path = folder / "preprocessing.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return harm


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def no_head(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_classes": 0}))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("head.")}, folder / "model.safetensors")


PRE = "preprocessing.json"
HARMS: list[tuple[Callable[[Path], object], list[str]]] = [
    (lambda f: (f / PRE).unlink(), [f"{PRE} is missing", "python launch/export.py RUN_DIR"]),
    (lambda f: (f / "config.json").unlink(), ["is not an exported model: config.json is missing"]),
    (write(PRE, ""), [PRE, "cannot be read", "not JSON"]),
    (write(PRE, "[]"), [PRE, "no JSON object"]),
    (change("format", 2), [PRE, "format is 2", "reads 1"]),
    (change("gamma", 2.2), [PRE, "unknown", "gamma"]),
    (
        change("interpolation", "nearest"),
        [PRE, "interpolation must be one of bilinear, bicubic", "'nearest'"],
    ),
    (change("crop", 1.5), [PRE, "crop must lie in (0, 1]", "1.5"]),
    (change("std", [0.5, 0.5, 0]), [PRE, "std be positive"]),
    (change("mean", [0.5]), [PRE, "3 numbers"]),
    (change("link", "argmax"), [PRE, "link must be one of softmax, sigmoid, none"]),
    (change("link", "none"), [PRE, "no classifier"]),
    (change("image_size", 32), [f"{PRE} is of another model than config.json", "32 and 16"]),
    (write("classes.txt", "cat\n"), ["classes.txt has 1 names for the 3 classes"]),
    (write("classes.txt", "a\n\nb\n"), ["classes.txt", "a line is empty"]),
    (no_head, ["num_classes is 0", "MegaVit.from_pretrained"]),
]


@pytest.mark.parametrize(("harm", "words"), HARMS, ids=range(len(HARMS)))
def test_exports_that_are_not_whole(tmp_path: Path, harm: Any, words: list[str]) -> None:
    """Catches probabilities of photos that were prepared in a way that nobody has chosen."""
    harm(write_export(tmp_path / "export"))
    with pytest.raises(ValueError) as error:
        megavit.load(tmp_path / "export")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device 'gpu' is not here; there are: cpu"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not here"),
        ({"device": "meta"}, "'meta' is not here"),
        ({"dtype": "float16"}, "must be float32 or bfloat16 \\(bf16\\), got float16"),
        ({"dtype": torch.int8}, "got torch.int8"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_options_of_load(folder: Path, options: dict[str, Any], words: str) -> None:
    """Catches an option that fails deep inside torch, or only at the first photo."""
    with pytest.raises(ValueError, match=words):
        megavit.load(folder, **options)


@pytest.mark.parametrize(
    ("photos", "words"),
    [
        ([], "there are no photos"),
        (3, "int is no photo; give a path"),
        ([None], "NoneType is no photo"),
        (b"", "not an image of a known format"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\) is no photo"),
        (np.zeros((3, 8, 8), np.uint8), r"numpy.ndarray of shape \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3), r"torch.Tensor of shape \(8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "is no photo"),
        (np.zeros((8, 8), np.int64), "type int64 have no known scale"),
        (torch.randn(3, 8, 8), r"must lie in \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"must lie in \[0, 1\], got nan"),
        (torch.zeros(1, 1, 3, 8, 8), "is no photo"),
        ([np.zeros((8, 8), np.uint8), b"x"], r"photos\[1\]: not an image"),
        (Image.new("F", (8, 8)), "floating point"),
    ],
)
def test_what_is_no_photo(model: Predictor, photos: Any, words: str) -> None:
    """Catches a mistake that is predicted with a straight face."""
    with pytest.raises(ValueError, match=words):
        model(photos)


def test_files_that_cannot_be_read_are_named(model: Predictor, tmp_path: Path) -> None:
    """Catches one bad file in a list of thousands that is not named."""
    (tmp_path / "bad.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="bad.jpg: not an image"):
        model([noise(0), tmp_path / "bad.jpg"])
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        model(tmp_path / "none.jpg")
