"""`launch/evaluate.py`: every task on data sets in their true form, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megavit.evaluate.protocols.corruption import ALEXNET
from megavit.evaluate.sets.imagenet_classes import imagenet_names
from megavit.evaluate.sets.imagenet_variants import CORRUPTIONS
from tests.evaluate.fixtures import (
    KIT_FOX,
    TENCH,
    WNIDS,
    _cifar_batch,
    encoded,
    make_celeba,
    make_everything,
    make_image_folder,
    make_imagenet_c,
    make_shards,
    put,
)
from tests.exports import write_export
from tests.launch.commands import ROOT, environment
from tests.launch.evaluations import Evaluation, evaluate, imagenet_export, run_main, three_colours

RELATIVES = ("imagenet-real", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every set, with as many training images as a held-out tenth takes, and all parts of ImageNet-C."""
    root = tmp_path_factory.mktemp("data")
    make_celeba(root, (24, 2, 12))
    make_everything_else = shutil.copytree(root / "celeba", root / "kept")
    shutil.rmtree(root / "celeba")
    make_everything(root)
    shutil.rmtree(root / "celeba")
    make_everything_else.rename(root / "celeba")
    for label in (KIT_FOX, TENCH):
        for i in range(2, 9):
            put(
                root / "imagenet" / "train" / WNIDS[label] / f"{WNIDS[label]}_{i}.JPEG",
                encoded(10 * label + i),
            )
    _cifar_batch(root / "cifar-100-python" / "train", b"fine_labels", [99, 0] * 8, 1)
    make_imagenet_c(root, CORRUPTIONS[1:])
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet_export(tmp_path_factory.mktemp("models") / "of imagenet")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_colours(tmp_path_factory.mktemp("data") / "colours", 60, 33)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("models") / "small", ("zero", "one", "two"))


def test_classifier_on_every_imagenet(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches labels of one set that are mapped to other classes, candidates that are left out, ReaL's images
    without a label that count, and a set that is not measured."""
    tasks = ",".join(("imagenet", *RELATIVES, "calibration:imagenet", "selective:imagenet"))
    found = evaluate(model, tmp_path / "out", "--tasks", tasks, "--data_root", root)
    assert found.code == 0, found.output
    expected = {  # of a model that says kit fox, goldfish, stingray, tench, toilet tissue
        "imagenet": (2 / 4, 2 / 4),
        "imagenet-real": (1 / 3, 2 / 3),
        "imagenet-v2": (0, 1 / 4),
        "imagenet-r": (2 / 4, 1),
        "imagenet-a": (2 / 4, 2 / 4),
        "imagenet-sketch": (0, 1 / 2),
    }
    for name, (top1, top5) in expected.items():
        assert found.value(name, name, "top1") == pytest.approx(top1), name
        assert found.value(name, name, "top5") == pytest.approx(top5), name
    assert found.value("objectnet", "objectnet", "top1") == 2 / 4
    assert found.value("calibration:imagenet", "imagenet", "ece") == pytest.approx(0.5)
    assert found.value("selective:imagenet", "imagenet", "accuracy_at_50") == pytest.approx(0.5)
    real = next(one for one in found.recorded.results if one.task == "imagenet-real")
    assert real.count == (4, 3, 0)


def test_classes_are_matched_by_name(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches a model whose classes are in another order, or have names in place of ids, that is scored by
    the places of the classes."""
    expected = evaluate(model, tmp_path / "ids", "--tasks", "imagenet,imagenet-a", "--data_root", root)
    named = imagenet_export(tmp_path / "named", imagenet_names())
    other = imagenet_export(tmp_path / "other", imagenet_names()[1:] + imagenet_names()[:1])
    found = evaluate(named, tmp_path / "names", "--tasks", "imagenet,imagenet-a", "--data_root", root)
    moved = evaluate(other, tmp_path / "moved", "--tasks", "imagenet,imagenet-a", "--data_root", root)
    assert found.values() == expected.values()
    # It says the class after kit fox, the one after goldfish, ...: none of these is in the validation set.
    assert moved.value("imagenet", "imagenet", "top1") == 0
    assert moved.value("imagenet", "imagenet", "top5") == 0


def test_imagenet_c(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches a part that is not counted, and AlexNet's errors in another order."""
    found = evaluate(model, tmp_path / "out", "--tasks", "imagenet-c", "--data_root", root)
    assert found.code == 0, found.output
    mce = np.mean([5 * 0.5 / sum(errors) for errors in ALEXNET.values()])
    assert found.value("imagenet-c", "imagenet-c", "mce") == pytest.approx(mce)
    assert found.value("imagenet-c", "imagenet-c", "relative_mce") == pytest.approx(0)
    assert found.value("imagenet-c", "imagenet-c", "corrupted_accuracy") == pytest.approx(0.5)
    counts = {one.metric: one.count for one in found.recorded.results}
    assert counts["mce"] == (150, 150, 0)


def test_imagenet_c_in_part_is_skipped(model: Path, tmp_path: Path) -> None:
    """Catches a mean over fewer corruptions that is called mCE, and hours of work before it is refused."""
    make_imagenet_c(tmp_path)
    found = evaluate(model, tmp_path / "out", "--tasks", "imagenet-c", "--data_root", tmp_path)
    assert (found.code, found.recorded.results) == (0, ())
    (skipped,) = found.recorded.skipped
    assert "lacks 70 of the 75 parts of mCE: shot_noise/1, " in skipped.reason
    assert "https://" in skipped.reason
    assert not (tmp_path / "cache").exists()


def test_sets_with_protocols_of_their_own(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches a set whose usual protocol is another, or that its features do not reach."""
    tasks = "cue-conflict,celeba,cifar10,cifar100,fairness,shape-bias"
    found = evaluate(model, tmp_path / "out", "--tasks", tasks, "--data_root", root)
    assert found.code == 0, found.output
    for task in ("cue-conflict", "shape-bias"):
        # It takes all for dogs, as one of three is by its shape, and one by its texture.
        assert found.value(task, "cue-conflict", "shape_bias") == 0.5
    for task in ("celeba", "fairness"):
        metrics = {one.metric: one.count.used for one in found.recorded.results if one.task == task}
        assert "accuracy_gap" in metrics and set(metrics.values()) <= {12, 6}, metrics
    assert "Smiling" in found.output or "binary" in found.output
    for name, used in (("cifar10", 3), ("cifar100", 2)):
        assert 0 <= found.value(name, name, "top1") <= 1
        assert {one.count.used for one in found.recorded.results if one.task == name} == {used}


def test_probes_of_imagenet_are_scored_on_its_relatives(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches a set that shares ImageNet's classes and is left out, and layers that are mixed up."""
    tasks = "linear:imagenet,knn:imagenet,fewshot:imagenet"
    layers = ("--layers", "all,patches")
    found = evaluate(model, tmp_path / "out", "--tasks", tasks, "--data_root", root, *layers)
    assert found.code == 0, found.output
    for task in tasks.split(","):
        results = [one for one in found.recorded.results if one.task == task and one.metric == "top1"]
        assert {one.data for one in results} == {"imagenet", *RELATIVES}
        assert {one.settings["layer"] for one in results} == {"block.0", "pooled", "patches"}
    real = [one for one in found.recorded.results if one.data == "imagenet-real"]
    assert {one.count.used for one in real} == {3}


def test_protocols_on_a_named_set(root: Path, model: Path, tmp_path: Path) -> None:
    """Catches PROTOCOL:SET that is another set's, and data outside the classes by name, by folder and by the
    photos that come with scikit-learn."""
    tasks = "knn:cifar10,fewshot:cifar100,linear-sgd:cifar10,ood:cifar10,ood:imagenet-a"
    words = ("--tasks", tasks, "--data_root", root, "--crop_area", "[0.5, 1.0]")
    found = evaluate(model, tmp_path / "out", *words, "--ood", "cue-conflict")
    assert found.code == 0, found.output
    assert found.value("knn:cifar10", "cifar10", "top1", k=10, neighbors=10) >= 0
    assert found.value("fewshot:cifar100", "cifar100", "top1", shots=10) >= 0
    assert found.value("linear-sgd:cifar10", "cifar10", "top1", crop_area=[0.5, 1.0]) >= 0
    metrics = {one.metric for one in found.recorded.results if one.task == "ood:cifar10"}
    assert {"auroc_msp", "auroc_energy", "auroc_mahalanobis", "auroc_knn"} <= metrics
    alone = {one.metric for one in found.recorded.results if one.task == "ood:imagenet-a"}
    assert "auroc_msp" in alone and "auroc_knn" not in alone  # there are no training images
    make_image_folder(tmp_path / "others")
    for named in (str(tmp_path / "others"), "sklearn-photos"):
        words = ("--tasks", "ood:cifar10", "--data_root", root, "--ood", named, "--limit", 5)
        found = evaluate(model, tmp_path / Path(named).name, *words)
        assert found.code == 0, found.output
        (name,) = {one.data for one in found.recorded.results}
        assert name.startswith("cifar10 / "), name


def test_a_set_of_ones_own(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a protocol that the command cannot do on shards, a forward pass for each of them, and bytes of
    the cache that are not announced."""
    tasks = "head,linear,linear-sgd,knn,fewshot,calibration,selective,corruption,ood"
    words = ("--data", colours, "--ood", "sklearn-photos")
    found = evaluate(small, tmp_path / "out", "--tasks", tasks, *words)
    assert found.code == 0, found.output
    assert {one.task for one in found.recorded.results} == set(tasks.split(","))
    assert found.output.count("colours test: features of 33 images, ") == 1
    assert found.output.count("colours test (fog 3): features of 33 images, ") == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "table.md", "table.csv"} < names and any(name.endswith(".png") for name in names)
    again = evaluate(small, tmp_path / "out", "--tasks", tasks, *words)
    assert again.code == 0 and "features of" not in again.output
    assert again.values() == found.values()
    other = evaluate(small, tmp_path / "other", "--tasks", "knn", *words, "--quiet", "true")
    assert "vote of the k nearest" not in other.output and "| knn " in other.output


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


def test_labels_of_other_classes_are_an_error(
    root: Path, model: Path, small: Path, colours: Path, tmp_path: Path
) -> None:
    """Catches a number for labels that are not the model's, one such task that ends the others, and a model
    without a classifier that is asked for one."""
    tasks = "imagenet,head,calibration,knn,imagenet-c,cue-conflict,head:cifar10"
    found = evaluate(small, tmp_path / "out", "--tasks", tasks, "--data", colours, "--data_root", root)
    assert found.code == 1
    errors = {one.task: one.error for one in found.recorded.failed}
    assert "imagenet has 1000 classes and the model 3 outputs" in errors["imagenet"]
    assert "imagenet-c" in errors and "1000 classes" in errors["cue-conflict"]
    assert "cifar10 has 10 classes and the model 3 outputs" in errors["head:cifar10"]
    assert {one.task for one in found.recorded.results} == {"head", "calibration", "knn"}
    assert "4 of 7 tasks failed: imagenet, imagenet-c, cue-conflict, head:cifar10" in found.output
    trunk = write_export(tmp_path / "trunk", (), num_classes=0, link="none")
    words = ("--data", colours, "--ood", "sklearn-photos")
    found = evaluate(trunk, tmp_path / "two", "--tasks", "head,corruption,knn,linear,ood", *words)
    errors = {one.task: one.error for one in found.recorded.failed}
    assert found.code == 1 and set(errors) == {"head", "corruption"}
    assert "trunk has no classifier; use linear, knn or fewshot" in errors["head"]
    metrics = {one.metric for one in found.recorded.results if one.task == "ood"}
    assert "auroc_knn" in metrics and "auroc_msp" not in metrics
    folder = make_shards(tmp_path / "grey")  # one channel, in which three classes of the same names are
    found = evaluate(small, tmp_path / "three", "--tasks", "head", "--data", folder)
    assert found.code == 0, found.output


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


def test_a_trial_is_marked(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a number of some images that stands for all, or takes the place of one of all."""
    words = ("--tasks", "head,knn", "--data", colours)
    trial = evaluate(small, tmp_path / "out", *words, "--limit", 10)
    assert {(one.limit, one.count.used) for one in trial.recorded.results} == {(10, 10)}
    assert "†" in trial.output and "--limit" in trial.output
    whole = evaluate(small, tmp_path / "out", *words)
    assert {(one.limit, one.count.used) for one in whole.recorded.results if one.limit is None} == {
        (None, 33)
    }
    assert "†" not in whole.output
    evaluate(small, tmp_path / "out", *words, "--limit", 10)
    assert "†" not in (tmp_path / "out" / "table.md").read_text()


def test_listing(root: Path, tmp_path: Path) -> None:
    """Catches a set that is not listed, or said to be there where it is not."""
    code, output, _ = run_main(["ls"])
    names = ("imagenet", *RELATIVES, "imagenet-c", "cifar10", "cifar100", "celeba", "cue-conflict")
    assert code == 0 and all(f"\n  {name} " in output for name in names)
    assert all(f"\n  {name} " in output for name in ("linear", "linear-sgd", "knn", "fewshot", "ood"))
    code, output, _ = run_main(["ls", "--data_root", str(root)])
    states = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.startswith(names)}
    assert code == 0 and states == dict.fromkeys(names, "found")
    code, output, _ = run_main(["ls", "--data_root", str(tmp_path / "nowhere")])
    states = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.startswith(names)}
    assert code == 0 and states == dict.fromkeys(names, "missing")
    assert run_main(["ls", "--data", "x"])[0] == 2


def two_results(tmp_path: Path, small: Path, colours: Path) -> list[Evaluation]:
    other = write_export(tmp_path / "other model", ("zero", "one", "two"), crop=0.5)
    words = ("--tasks", "head,knn", "--data", colours)
    return [evaluate(small, tmp_path / "a", *words), evaluate(other, tmp_path / "b", *words)]


def test_table_of_two_models(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches models that do not stand side by side, and a table that is not written."""
    two_results(tmp_path, small, colours)
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    code, output, errors = run_main(["table", *files, "--out", str(tmp_path / "tables")])
    assert code == 0, errors
    assert " small |" in output.splitlines()[0] and " other model |" in output.splitlines()[0]
    assert (tmp_path / "tables" / "table.md").read_text() in output
    for words in (["table"], ["table", str(tmp_path / "none.json")], ["table", __file__]):
        code, output, errors = run_main(words)
        assert code == 2 and errors.startswith("error: ") and not output


def started(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "evaluate.py"), *map(str, words)]


@pytest.mark.slow
def test_whoever_reads_may_leave(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches a traceback where the output goes to `head`."""
    two_results(tmp_path, small, colours)
    for words in (("ls",), ("table", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "tables")):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            started(*words), stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), timeout=300
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "tables" / "table.csv").exists()


@pytest.mark.slow
def test_the_installed_command(small: Path, colours: Path, tmp_path: Path) -> None:
    """Catches `megavit evaluate` that is not known, or that says or finds something else."""
    words = ["--tasks", "head,knn", "--data", str(colours), "--cache_dir", str(tmp_path / "cache")]
    expected = evaluate(small, tmp_path / "here", "--tasks", "head,knn", "--data", colours)
    done = subprocess.run(
        [sys.executable, "-m", "megavit", "evaluate", str(small), *words, "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = Evaluation(0, done.stdout, done.stderr, expected.recorded)
    assert "| knn " in found.output
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["value"] for row in content["results"]] == [one.value for one in expected.recorded.results]
