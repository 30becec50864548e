"""`launch/explain.py` on photos and data sets, on one rank and on several."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import megavit
from megavit.evaluate.sets.shards import own_data
from megavit.launch.explain import main
from tests.exports import NAMES, write_export
from tests.launch.test_predict import encoded, photo
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(photo(40 + number, 30 + number), "PNG"))
    return folder


@pytest.fixture(scope="module")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images by class."""
    root = tmp_path_factory.mktemp("data")
    for part, name in itertools.product(("train", "test"), NAMES):
        (root / part / name).mkdir(parents=True)
        for path in photos.iterdir():
            (root / part / name / path.name).write_bytes(path.read_bytes())
    return root


def records(out: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*/explanation.json"))]
    return {record["name"]: record for record in found}


def maps(out: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(out.glob("*/*.npy"))]


def test_photos_and_data_are_explained_in_their_order(
    export: Path, photos: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches images that a batch leaves out, maps of another image, and numbers that are not said."""
    words = [str(export), str(photos / "4.png"), str(photos), "--data", str(data), "--num", "4"]
    words += ["--methods", "located,frozen, located", "--against", "cat", "--seed", "2"]
    assert main([*words, "--out", str(tmp_path / "a"), "--batch_size", "4"]) == 0
    shown = capsys.readouterr()
    folders = sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_dir())
    chosen = own_data(data)["test"].first(4)
    keys = [chosen.images.key(row) for row in range(4)]
    assert [name[4:] for name in folders] == ["4", "0", "1", "2", "3", "4", *(Path(key).stem for key in keys)]
    found = records(tmp_path / "a")
    assert all(found[key]["label"] == Path(key).parent.name for key in keys)
    assert found[str(photos / "1.png")]["label"] is None
    for record in found.values():
        assert record["against"]["name"] == "cat" and record["target"]["name"] != "cat"
        assert list(record["methods"]) == ["located", "frozen"]
        assert record["provenance"]["data_digest"] and record["provenance"]["seed"] == 2
    assert f"{photos / '3.png'}: says" in shown.out and "rather than cat" in shown.out
    assert shown.out.count("sums to") == 10 and shown.out.count("centred Gaussian") == 10
    assert shown.out.splitlines()[-1] == f"{tmp_path / 'a' / 'index.html'} shows all" and not shown.err
    assert main([*words, "--out", str(tmp_path / "b"), "--batch_size", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    for mine, theirs in zip(maps(tmp_path / "a"), maps(tmp_path / "b"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


def trained_on(data: Path, export: Path, *words: str) -> list[str]:
    return [
        str(export),
        "--data",
        str(data),
        "--num",
        "3",
        "--faithfulness",
        "false",
        "--train",
        str(data),
        *words,
    ]


def test_training_images_stand_beside_the_decision(
    export: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches training images of another image of the batch, and pictures that are not theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(trained_on(data, export, "--out", str(tmp_path / "out"), "--batch_size", "2")) == 0
    assert "the steps that read a training image are not known" in capsys.readouterr().err
    for name, record in records(tmp_path / "out").items():
        assert list(record["training"]) == ["similar", "helpful", "harmful"]
        similar = record["training"]["similar"]
        # The training images are copies of the test images.
        assert similar[0]["value"] == pytest.approx(1.0, abs=1e-5)
        assert Path(similar[0]["key"]).name == Path(name).name and similar[0]["steps"] is None
        assert all(image["value"] > 0 for image in record["training"]["helpful"])
        assert all(image["value"] < 0 for image in record["training"]["harmful"])
        assert "classifier alone" in record["provenance"]["training"]["about"]
    assert (tmp_path / "out" / "index.html").read_text().count("Training images that pushed") == 6


def test_wrong_labels_are_listed(
    export: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a list of the best training images, and words of the model about another image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    predictor = megavit.load(export)
    for part, number in itertools.product(("train", "test"), range(12)):
        image = photo(50 + 3 * number, 40).rotate(15 * number)
        said = predictor(image).top(1)[0][0][0]
        wrong = part == "train" and number == 7
        name = NAMES[(NAMES.index(said) + wrong) % 3]
        (tmp_path / "data" / part / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / part / name / f"{number}.png")
    for part, name in itertools.product(("train", "test"), NAMES):  # each has every class
        (tmp_path / "data" / part / name).mkdir(parents=True, exist_ok=True)
    words = ["influence", str(export), "--train", str(tmp_path / "data"), "--num", "3"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "influence.json").read_text())
    for kind in ("harmful", "odd"):
        first = record[kind][0]
        assert Path(first["key"]).name == "7.png" and not first["model_says"].startswith(first["label_name"])
        assert (
            f"{first['key']}: labelled {first['label_name']}, says" in capsys.readouterr().out
            or kind == "odd"
        )
    assert "the model says" in (tmp_path / "out" / "index.html").read_text()
    assert main(["influence", str(export), "--train", str(tmp_path / "none")]) == 2


def test_training_images_of_other_classes_are_refused(
    export: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches influence on classes that the model does not have."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "1.png").write_bytes((photos / "1.png").read_bytes())
    assert (
        main(
            [
                str(export),
                str(photos / "1.png"),
                "--train",
                str(tmp_path / "data"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "data has 2 classes, the model 3" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(
    export: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a batch that is lost with one photo, and an exit status that says all went well."""
    (tmp_path / "text.jpg").write_bytes(b"Dear all,")
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "none.jpg", photos / "1.png", tmp_path / "text.jpg", tmp_path / "empty"]
    out = tmp_path / "out"
    words = ["--faithfulness", "false", "--out", str(out)]
    assert main([str(export), *map(str, given), *words]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "empty: this folder holds no photos" in said[0]
    assert "none.jpg: No such file" in said[1] and "text.jpg: not an image" in said[2]
    assert list(records(out)) == [str(photos / "1.png")] and (out / "index.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EXPORT"], "there is nothing to explain: name photos, or a data set with --data DIR"),
        (["EXPORT", "x.jpg", "--num", "3"], "name these with --data"),
        (["EXPORT", "--data", "x", "--num", "0"], "--num must be at least 1, got 0"),
        (["EXPORT", "x.jpg", "--target", "kat"], "--target: no class is called 'kat', nor"),
        (["EXPORT", "x.jpg", "--against", "3"], "--against: no class is called '3', nor"),
        (["EXPORT", "x.jpg", "--target", "cat", "--against", "cat"], "both 'cat'; name two classes"),
        (["EXPORT", "x.jpg", "--target", "cat", "--against", "1"], "target and against are the same class"),
        (["EXPORT", "x.jpg", "--methods", "ocluded"], "--methods: no method is called 'ocluded'; there are"),
        (["EXPORT", "x.jpg", "--methods", ","], "--methods: no method is named; there are located"),
        (["EXPORT", "x.jpg", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["EXPORT", "x.jpg", "--tensor_parallel_size", "2"], "does not divide the 1 ranks"),
        (["EXPORT", "--data", "nowhere"], "nowhere"),
        (["influence", "EXPORT"], "--train DIR must name the training images"),
        (["nowhere", "x.jpg"], "nowhere is not an exported model: config.json is missing"),
        (["FEATURES", "x.jpg"], "a model without a classifier"),
    ],
)
def test_wrong_arguments(
    export: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, an error that does not name the fix, and a folder that is left behind."""
    if "FEATURES" in words:
        write_export(tmp_path / "features", names=(), num_classes=0, link="none")
    names = {"EXPORT": export, "FEATURES": tmp_path / "features"}
    words = [str(names.get(word, word)) for word in words]
    try:
        status = main([*words, "--out", str(tmp_path / "out")])
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    assert status == 2 and shown.err.count("\n") == 1 and said in shown.err and shown.out == ""
    assert not (tmp_path / "out").exists()


def main_with_cache(folder: str, words: list[str]) -> int:
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        return main(words)


@pytest.mark.dist
def test_ranks_find_the_training_images_of_a_single_process(export: Path, data: Path, tmp_path: Path) -> None:
    """Catches training images of another rank's image, and a rank without any that others wait for."""
    words = trained_on(data, export, "--batch_size", "1", "--out")
    assert main_with_cache(str(tmp_path / "cache 1"), [*words, str(tmp_path / "single")]) == 0
    sharded = [*words, str(tmp_path / "sharded"), "--tensor_parallel_size", "2"]
    assert run_ranks(4, main_with_cache, str(tmp_path / "cache 2"), sharded) == [0] * 4
    mine, theirs = records(tmp_path / "sharded"), records(tmp_path / "single")
    assert list(mine) == list(theirs)
    for name, record in mine.items():
        for kind, images in theirs[name]["training"].items():
            found = [image["value"] for image in record["training"][kind]]
            assert found == pytest.approx([image["value"] for image in images], rel=1e-3, abs=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 2), (2, 1), (4, 2)])
def test_ranks_write_what_a_single_process_writes(
    export: Path, photos: Path, tmp_path: Path, ranks: int, tp_size: int
) -> None:
    """Catches sharded maps that are no one's, images that two ranks share out wrongly, and two writers."""
    words = [str(export), str(photos), "--methods", "located,frozen,relevance,occlusion", "--batch_size", "2"]
    assert main([*words, "--out", str(tmp_path / "single"), "--quiet"]) == 0
    sharded = [*words, "--out", str(tmp_path / "sharded"), "--tensor_parallel_size", str(tp_size)]
    assert run_ranks(ranks, main, sharded) == [0] * ranks
    mine, theirs = records(tmp_path / "sharded"), records(tmp_path / "single")
    assert list(mine) == list(theirs) and len(mine) == 5
    for name, record in mine.items():
        assert record["top"][0]["name"] == theirs[name]["top"][0]["name"]
        assert record["provenance"]["tp_size"] == tp_size
    for found, expected in zip(maps(tmp_path / "sharded"), maps(tmp_path / "single"), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
