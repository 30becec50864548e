"""Results and their file: strict JSON, whole after every task, with the newest of each kind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavit.evaluate.results import Count, Failed, Measurement, Result, Skipped, versions
from megavit.evaluate.results_file import RESULTS_FILE, ResultsFile, read_results
from tests.evaluate.made import made, measured


def strict(path: Path) -> Any:
    """The file's JSON; Python's own words NaN and Infinity are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Catches a field that is lost, renamed or rounded on its way through the file."""
    settings = {
        "k": np.int64(20),
        "layer": "pooled",
        "temperature": np.float32(0.5),
        "flag": np.bool_(True),
        "curve": [(0.5, 0.1), (1.0, torch.tensor(0.25))],
        "accuracy": {"fog": np.array([0.5, 0.25])},
        "path": Path("a/b"),
        5: None,
    }
    one = made(measured(value=1 / 3, settings=settings), limit=100, dp_size=3, tp_size=2)
    two = made(measured("ece", torch.tensor(0.25), None, higher_is_better=False, data="ümlaut|set"))
    skipped, failed = (
        Skipped("imagenet-c", "not there\nlayout"),
        Failed("ood", 'a "quoted" error', "svhn", "m"),
    )
    ResultsFile(tmp_path).add(one, two, skipped, failed)
    found = read_results(tmp_path)
    assert (found.results, found.skipped, found.failed) == ((one, two), (skipped,), (failed,))
    assert found == read_results(tmp_path / RESULTS_FILE)
    row = strict(tmp_path / RESULTS_FILE)["results"][0]
    assert row["value"] == 1 / 3 and row["n"] == {"given": 360, "used": 360, "bad": 0}
    assert row["settings"] == {
        "k": 20,
        "layer": "pooled",
        "temperature": 0.5,
        "flag": True,
        "curve": [[0.5, 0.1], [1.0, 0.25]],
        "accuracy": {"fog": [0.5, 0.25]},
        "path": "a/b",
        "5": None,
    }
    assert found.results[1].data == "ümlaut|set" and found.results[0].data == "digits"
    fields = {field.name for field in dataclasses.fields(Result)} - {"count"} | {"n"}
    assert set(row) == fields, "every field is in the file"
    text = (tmp_path / RESULTS_FILE).read_text(encoding="utf-8")
    assert '"curve": [[0.5, 0.1], [1.0, 0.25]]' in text, "a curve takes a line, not one for each number"


def test_numbers_that_are_not_finite_are_words(tmp_path: Path) -> None:
    """Catches NaN in the file, which is no JSON and stops other readers."""
    nan = float("nan")
    ResultsFile(tmp_path).add(
        made(measured(value=nan, stderr=float("inf"), settings={"bins": [[0, nan, -float("inf")]]}))
    )
    row = strict(tmp_path / RESULTS_FILE)["results"][0]
    assert (row["value"], row["stderr"], row["settings"]["bins"]) == ("nan", "inf", [[0, "nan", "-inf"]])
    (found,) = read_results(tmp_path).results
    assert np.isnan(found.value) and found.stderr == float("inf")
    ResultsFile(tmp_path).add()  # written again, from what was read
    assert strict(tmp_path / RESULTS_FILE)["results"] == [row]


def test_the_file_is_whole_after_every_task(tmp_path: Path) -> None:
    """Catches results that are kept in memory until the end: a kill must cost the running task only."""
    script = """
import os, signal, sys
from megavit.evaluate.results_file import ResultsFile
from tests.evaluate.made import made, measured
file = ResultsFile(sys.argv[1])
for task in ("linear", "knn"):
    file.add(made(measured(), task))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [result.task for result in read_results(tmp_path).results] == ["linear", "knn"]
    file = ResultsFile(tmp_path)
    for number, task in enumerate(("fewshot", "ood"), start=3):
        file.add(made(measured(), task))
        assert len(strict(file.path)["results"]) == number
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that costs the results which were there, or leaves half a file beside them."""
    file = ResultsFile(tmp_path)
    file.add(made(measured()))
    before = file.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.add(made(measured(), "knn"))
    assert file.path.read_bytes() == before and os.listdir(tmp_path) == [RESULTS_FILE]


def values(folder: Path) -> list[float]:
    return [result.value for result in read_results(folder).results]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "knn"},
        {"data": "cifar10"},
        {"checkpoint_digest": "b" * 32},
        {"protocol": "linear probe by SGD"},
        {"transform": "resize 16"},
        {"metric": "top5"},
        {"settings": {"k": 10}},
        {"settings": {"k": 20, "layer": 3}},
        {"settings": {"k": 20, "link": "sigmoid"}},
    ],
)
def test_a_result_of_something_else_is_kept(tmp_path: Path, change: dict[str, Any]) -> None:
    """Catches a second run that forgets what the first one measured of another thing."""
    file = ResultsFile(tmp_path)
    file.add(made(measured(value=0.1, settings={"k": 20, "l2": 1.0})))
    of_measurement = {name: change[name] for name in ("metric", "settings") if name in change}
    facts = {name: change[name] for name in change if name not in of_measurement}
    file.add(made(measured(**{"value": 0.2, "settings": {"k": 20, "l2": 1.0}, **of_measurement}), **facts))
    assert values(tmp_path) == [0.1, 0.2]


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 9.0},
        {"device": "H100", "dp_size": 8, "versions": {}},
        {"data_digest": "e" * 32},
        {"model": "the same weights in another folder"},
        {"settings": {"k": 20, "l2": 10.0, "held_out_images": 12, "converged": True, "curve": [[1, 2]]}},
    ],
)
def test_a_newer_result_of_the_same_replaces(tmp_path: Path, change: dict[str, Any]) -> None:
    """Catches rows that pile up because of a date, a number of ranks, or what was found on the way."""
    file = ResultsFile(tmp_path)
    old = {"k": 20, "l2": 1.0, "curve": [[1, 3]]}
    file.add(made(measured(value=0.1, settings=old)), made(measured(value=0.3), "fewshot"))
    settings = change.pop("settings", old)
    file.add(made(measured(value=0.2, settings=settings), **change))
    assert values(tmp_path) == [0.3, 0.2]


def test_results_of_one_task_do_not_replace_each_other(tmp_path: Path) -> None:
    """Catches a task whose rows differ in nothing that the rule knows, and lose all but the last."""
    file = ResultsFile(tmp_path)
    for _ in range(2):
        file.add(made(measured(value=0.1)), made(measured(value=0.2)))
    assert values(tmp_path) == [0.1, 0.2]


def test_a_trial_does_not_replace_a_result(tmp_path: Path) -> None:
    """Catches `--limit 10` over a night's results."""
    file = ResultsFile(tmp_path)
    file.add(made(measured(value=0.1), limit=50))
    file.add(made(measured(value=0.2), limit=10))
    assert values(tmp_path) == [0.2]
    file.add(made(measured(value=0.3)))
    assert values(tmp_path) == [0.3]
    file.add(made(measured(value=0.4), limit=10))
    assert values(tmp_path) == [0.3, 0.4]


def test_what_was_skipped_is_forgotten_once_it_is_there(tmp_path: Path) -> None:
    """Catches a table that says a set is missing, beside its numbers."""
    file = ResultsFile(tmp_path)
    file.add(
        Skipped("imagenet-c", "no data"), Failed("linear", "out of memory"), Skipped("ood", "no svhn", "svhn")
    )
    file.add(Skipped("imagenet-c", "still no data"), Failed("imagenet-c", "unreadable", "fog"))
    found = read_results(tmp_path)
    assert [entry.reason for entry in found.skipped] == ["no svhn", "still no data"]
    file.add(made(measured()), made(measured(), "ood", data="cifar10"))
    found = read_results(tmp_path)
    assert [entry.task for entry in found.failed] == ["imagenet-c"], "linear has a result now"
    assert [entry.task for entry in found.skipped] == ["ood", "imagenet-c"], "svhn is still missing"


def damage(path: Path, change: str) -> None:
    content = json.loads(path.read_text())
    row = content["results"][0]
    if change == "cut":
        path.write_bytes(path.read_bytes()[:200])
        return
    if change == "binary":
        path.write_bytes(b"\x89PNG\xff\xfe")
        return
    if change == "nan":
        path.write_text(path.read_text().replace("0.95", "NaN"))
        return
    if change == "other":
        content = {"epoch": 3}
    elif change == "list":
        content = [1]
    elif change == "newer":
        content["format"] = 2
    elif change == "rows":
        content["results"] = {}
    elif change == "row":
        content["results"].append(3)
    elif change == "lacks":
        del row["metric"], row["date"]
    elif change == "type":
        row["dp_size"] = "two"
    elif change == "count":
        del row["n"]["used"]
    elif change == "value":
        row["value"] = "high"
    elif change == "skipped":
        content["skipped"] = [{"task": "ood"}]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", "is damaged, or no results file"),
        ("binary", "is damaged, or no results file"),
        ("nan", "NaN is not JSON"),
        ("other", 'lacks "format"; give the results.json'),
        ("list", 'lacks "format"; give the results.json'),
        ("newer", "has format 2, and this megavit reads 1: use the megavit that wrote it"),
        ("rows", "results must be a list"),
        ("row", r"results\[1\] must be an object, got 3"),
        ("lacks", r"results\[0\] lacks metric, date; move the file away"),
        ("type", r"results\[0\] dp_size must be a whole number, got 'two'"),
        ("count", r"results\[0\] n.used must be a whole number, got None"),
        ("value", r"results\[0\] value must be a finite number, got 'high'"),
        ("skipped", r"skipped\[0\] lacks reason, data, model"),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(tmp_path: Path, change: str, message: str) -> None:
    """Catches a traceback, or a file that is overwritten, where a person must decide."""
    path = ResultsFile(tmp_path).path
    ResultsFile(tmp_path).add(made(measured()))
    damage(path, change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=message):
        ResultsFile(tmp_path)
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Catches a bare errno for a mistyped path."""
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.json: there is no such file; give the results.json"
    ):
        read_results(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"results.json: there is no such file"):
        read_results(tmp_path)


def test_versions_and_date() -> None:
    """Catches results that cannot be repeated because nobody knows by what they were made."""
    found = versions()
    assert torch.__version__.startswith(found["torch"])
    assert {"megavit", "torchvision", "numpy", "torchmetrics", "python", "commit"} <= set(found)
    date = made(measured()).date
    assert date.endswith("+00:00") and date[10] == "T"


def test_a_measurement_keeps_its_own_set() -> None:
    """Catches a probe's numbers on ImageNet-A filed under ImageNet."""
    one = Measurement("top1", 0.5, Count(4, 3, 1), data="imagenet-a")
    assert made(one, data="imagenet").data == "imagenet-a"
    assert made(dataclasses.replace(one, data=""), data="imagenet").data == "imagenet"
    assert made(one).count == Count(4, 3, 1)
