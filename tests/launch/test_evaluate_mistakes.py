"""`launch/evaluate.py` with wrong words, missing or damaged data, and places that cannot be written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.evaluate.fixtures import encoded, put
from tests.exports import write_export
from tests.launch.evaluations import evaluate, run_main, three_colours


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_colours(tmp_path_factory.mktemp("data") / "colours", 60, 33)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("models") / "small", ("zero", "one", "two"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tasks", "linaer"], "'linaer' is unknown; did you mean 'linear'?"),
        (["--tasks", "knn:imagnet"], "has no data set 'imagnet'; did you mean 'imagenet'?"),
        (["--tasks", "knn:"], "has no data set ''"),
        (["--tasks", "imagenet:knn"], "'imagenet:knn' is unknown"),
        ([], "--tasks names nothing to measure"),
        (["--tasks", " , "], "--tasks names nothing to measure"),
        (["--tasks", "knn"], "knn needs --data DIR, or a set: knn:imagenet"),
        (["--tasks", "imagenet-a"], "imagenet-a needs --data_root DIR"),
        (["--tasks", "shape-bias"], "shape-bias needs --data_root DIR, the folder of cue-conflict"),
        (["--tasks", "ood", "--data", "."], "ood needs --ood"),
        (["--tasks", "ood", "--data", ".", "--ood", "cifar10"], "--ood cifar10 needs --data_root"),
        (["--tasks", "linear:imagenet-a", "--data_root", "."], "linear:imagenet is scored on it too"),
        (["--tasks", "knn:imagenet-c", "--data_root", "."], "write imagenet-c alone"),
        (["--tasks", "fairness:cifar10", "--data_root", "."], "fairness is measured on celeba only"),
        (["--tasks", "imagenet-c:imagenet", "--data_root", "."], "measured on imagenet-c only"),
        (["--tasks", "knn", "--data", ".", "--cache_dtype", "float8"], "--cache_dtype"),
        (["--tasks", "knn", "--data", ".", "--batch_size", "0"], "--batch_size"),
        (["--tasks", "knn", "--data", ".", "--limit", "-1"], "--limit and --seed cannot be negative"),
        (["--tasks", "knn", "--data", ".", "--workers", "-1"], "--workers cannot be negative"),
        (["--tasks", "knn", "--data", ".", "--crop_area", "[1, 0.5]"], "--crop_area"),
        (["--taskz", "knn"], "--tasks"),
    ],
)
def test_wrong_words_are_said_at_once(words: list[str], expected: str, tmp_path: Path) -> None:
    """Catches a mistake that is seen after the model was read, or that is measured as something else."""
    code, output, errors = run_main([str(tmp_path / "no model"), *words])
    assert (code, output) == (2, "")
    assert expected in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_data_that_are_not_there_are_skipped(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a missing set that ends the command or is not seen by a script, and a reason without a path."""
    tasks = ("--tasks", "imagenet,knn,head:cifar10", "--data", tmp_path / "nowhere", "--data_root", tmp_path)
    for words, code in (((), 0), (("--strict", "true"), 3)):
        found = evaluate(small, tmp_path / "out", *tasks, *words)
        assert (found.code, found.recorded.results, found.recorded.failed) == (code, (), ())
        reasons = {one.task: one.reason for one in found.recorded.skipped}
        assert str(tmp_path / "imagenet") in reasons["imagenet"]
        assert f"{tmp_path / 'nowhere'} does not exist" in reasons["knn"]
        assert "cifar-10-batches-py" in reasons["head:cifar10"]
        assert "skipped imagenet: " in found.output
    # The others are measured, and what is there now is no longer skipped.
    found = evaluate(small, tmp_path / "out", "--tasks", "knn,imagenet", *tasks[4:], "--data", colours)
    assert {one.task for one in found.recorded.results} == {"knn"}
    assert {one.task for one in found.recorded.skipped} == {"imagenet", "head:cifar10"}


def test_a_split_that_is_not_there_is_skipped(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches shards without train, of which the classifier can be scored all the same."""
    shutil.copytree(colours, tmp_path / "part")
    for path in (tmp_path / "part").glob("train*"):
        path.unlink()
    words = ("--data", tmp_path / "part", "--ood", "sklearn-photos")
    found = evaluate(small, tmp_path / "out", "--tasks", "linear,head,ood", *words)
    assert found.code == 0
    (skipped,) = found.recorded.skipped
    assert skipped.task == "linear" and "has no train images; it has test" in skipped.reason
    assert {one.task for one in found.recorded.results} == {"head", "ood"}
    assert "no distances to training images" in found.output


def test_folders_of_other_names_are_no_classes_of_the_model(small: Path, tmp_path: Path) -> None:
    """Catches folders whose places are taken for class numbers."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog", "two")):
            for i in range(4):
                put(tmp_path / "own" / split / name / f"{i}.png", encoded(10 * number + i, "PNG"))
    found = evaluate(small, tmp_path / "out", "--tasks", "head,knn", "--data", tmp_path / "own")
    (failed,) = found.recorded.failed
    assert failed.task == "head" and "such as 'cat', 'dog'" in failed.error
    assert found.code == 1 and {one.task for one in found.recorded.results} == {"knn"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("block.1", "block.1"), ("pooled,last", "'last'"), ("", "''"), ("block.x", "block.x")],
)
def test_layers_that_there_are_not(
    layers: str, expected: str, small: Path, colours: Path, tmp_path: Path
) -> None:
    """Catches a layer that is silently another one."""
    words = ("--tasks", "knn", "--data", colours, f"--layers={layers}")
    found = evaluate(small, tmp_path / "out", *words)
    assert found.code == 1 and found.errors.startswith("error: --layers: ") and expected in found.errors
    assert not found.recorded.results


def test_models_that_are_none(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a traceback, or a run that has not ended taken for a model."""
    words = ("--tasks", "knn", "--data", colours)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    damaged = shutil.copytree(small, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 99)
    other = shutil.copytree(small, tmp_path / "other")
    (other / "preprocessing.json").unlink()
    for name, expected in (
        ("nowhere", "config.json is missing"),
        ("empty", "config.json is missing"),
        ("run", "its run has not ended; python launch/export.py"),
        ("damaged", "model.safetensors is damaged"),
        ("other", "preprocessing.json"),
        ("timm:no_such_model", "no_such_model"),
    ):
        found = evaluate(name if ":" in name else tmp_path / name, tmp_path / "out", *words)
        assert found.code == 1 and found.errors.startswith("error: ") and expected in found.errors, found
        assert not found.recorded.results


def test_a_run_folder_with_spaces(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a model that is called export, and results that do not go into the run's folder."""
    shutil.copytree(small, tmp_path / "my first run" / "export")
    argv = [str(tmp_path / "my first run"), "--tasks", "knn", "--data", str(colours)]
    code, output, errors = run_main([*argv, "--cache_dir", str(tmp_path / "cache"), "--local_rank=0"])
    assert code == 0, errors
    content = json.loads((tmp_path / "my first run" / "evaluation" / "results.json").read_text())
    assert {row["model"] for row in content["results"]} == {"my first run"}
    assert "my first run" in output


def test_places_that_cannot_be_written(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches an hour of features before the place of the results is tried, damaged results that are
    overwritten, and a cache that cannot be written without a word of how to have another."""
    words = ("--tasks", "knn,head", "--data", colours)
    (tmp_path / "file").write_text("")
    found = evaluate(small, tmp_path / "file" / "out", *words)
    assert found.code == 1 and "error: " in found.errors and str(tmp_path / "file") in found.errors
    assert not (tmp_path / "cache").exists()
    damaged = put(tmp_path / "damaged" / "results.json", '{"format": 1, "results": [{]}')
    found = evaluate(small, tmp_path / "damaged", *words)
    assert found.code == 1 and "is damaged" in found.errors and "move the file away" in found.errors
    assert damaged.read_text().endswith("[{]}") and not (tmp_path / "cache").exists()
    found = evaluate(small, tmp_path / "out", *words, "--cache_dir", tmp_path / "file")
    assert found.code == 1
    errors = {one.task: one.error for one in found.recorded.failed}
    assert set(errors) == {"knn", "head"} and "name another folder with --cache_dir" in errors["knn"]


def test_images_that_cannot_be_read_are_named(small: Path, tmp_path: Path) -> None:
    """Catches a broken image that is counted as wrong, ends the task, or is not named."""
    for split in ("train", "test"):
        for number, name in enumerate(("zero", "one", "two")):
            for i in range(8):
                put(tmp_path / "own" / split / name / f"{i}.png", encoded(10 * number + i, "PNG"))
    put(tmp_path / "own" / "test" / "one" / "3.png", b"no image")
    for i in range(5):
        put(tmp_path / "own" / "train" / "two" / f"{i}.png", encoded(i, "PNG")[:60])
    found = evaluate(small, tmp_path / "out", "--tasks", "head,knn,corruption", "--data", tmp_path / "own")
    assert found.code == 0, found.output
    counts = {one.task: one.count for one in found.recorded.results}
    assert counts["head"] == counts["knn"] == (24, 23, 1)
    assert found.value("knn", "own", "top1", k=200, neighbors=19) >= 0
    assert (
        found.output.count("own test: images that could not be used and are left out: 1: test/one/3.png: ")
        == 1
    )
    assert "own train: images that could not be used and are left out: 5: " in found.output
    assert "; and 2 more" in found.output
    assert "23 (1 bad)" in found.output
    shutil.rmtree(tmp_path / "own" / "test")
    for i in range(3):
        put(tmp_path / "own" / "test" / "one" / f"{i}.png", b"no image")
    found = evaluate(small, tmp_path / "none", "--tasks", "head,knn", "--data", tmp_path / "own")
    assert (found.code, found.recorded.results) == (1, ())
    assert {one.task for one in found.recorded.failed} == {"head", "knn"}
    assert all("none of the images could be used" in one.error for one in found.recorded.failed)
