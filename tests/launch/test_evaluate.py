"""`launch/evaluate.py`: every task on data sets in their true form, listings and tables."""

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
