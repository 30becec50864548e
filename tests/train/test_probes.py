"""`--eval.tasks`: protocols on frozen features inside a training run, at any layout."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from megavit.launch import evaluate as evaluate_command
from megavit.train.config import EvalConfig, RunConfig
from tests.ranks import run_ranks
from tests.tasks.test_own_task import own_run, write_ink
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TRAIN, VAL = 101, 37  # which no number of ranks divides
ALL = "knn,fewshot,linear"
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
SHORT = {"max_steps": 2, "eval_every": 1}


def write_digits(folder: Path, first: int, count: int, name: str, bad: int | None = None) -> None:
    """Some digits as a shard; the image numbered `bad` is broken."""
    images, labels = load_digits(return_X_y=True)
    with wds.TarWriter(str(folder / f"{name}-0.tar"), encoder=False, mtime=0) as tar:
        for number in range(count):
            buffer = io.BytesIO()
            pixels = (images[first + number].reshape(8, 8) * 15.9).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            image = b"broken" if number == bad else buffer.getvalue()
            label = str(labels[first + number]).encode()
            tar.write({"__key__": f"{number:03}", "png": image, "cls": label})


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 101 images to learn from and 37 to test on, one of each broken, and another 10 to test on."""
    folder = tmp_path_factory.mktemp("few")
    write_digits(folder, 0, TRAIN, "train", bad=7)
    write_digits(folder, TRAIN, VAL, "val", bad=35)
    write_digits(folder, TRAIN + VAL, 10, "other")
    (folder / "classes.txt").write_text("".join(f"digit {number}\n" for number in range(10)))
    return folder


def probed_run(few: Path, folder: Path, tasks: str = ALL, **changes: Any) -> RunConfig:
    shards = {"data__shards": f"{few}/train-0.tar", "data__val_shards": f"{few}/val-0.tar"}
    run = small_run(few, folder, **SHORT | shards | changes)
    return dataclasses.replace(run, eval=EvalConfig(tasks))


def small_ds(stage: int, **more: Any) -> dict[str, Any]:
    """Micro-batches of 4: the last of the 37 images leave some ranks without any."""
    return ds_config(stage, batch=24, micro_batch=4) | more


def probed(folder: Path, name: str = "val") -> list[dict[str, float]]:
    """What the protocols found in each evaluation on a set."""
    prefix = f"eval/{name}/"
    rows = [row for row in log_of(folder) if row.get("eval") == name]
    return [
        {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(starts(prefix))}
        for row in rows
    ]


def starts(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{protocol}" for protocol in ALL.split(","))


@pytest.fixture(scope="module")
def single(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, without ZeRO."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run = probed_run(few, folder, data__val=(f"other={few}/other-0.tar",))
    assert run_ranks(1, train_here, run, small_ds(0)) == [""]
    return folder


def test_all_of_it_is_in_the_log(single: Path) -> None:
    """Catches results that are not logged, or not for each set and each evaluation."""
    expected = {f"knn{k}_top{n}" for k in (10, 20, 100, 200) for n in (1, 5)}
    expected |= {f"fewshot{shots}_top1" for shots in (1, 5, 10, 25)} | {"linear_top1", "linear_top5"}
    for name in ("val", "other"):
        evaluations = probed(single, name)
        assert [set(found) for found in evaluations] == [expected] * 2
    last = probed(single)[-1]
    assert last["linear_top1"] > 0.25  # of ten classes, by a model that has hardly learned
    share = last["linear_top1"] * (VAL - 1)  # one of the images is broken
    assert share == pytest.approx(round(share), abs=1e-9)


@pytest.fixture(scope="module")
def sharded(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two shards of the model, which two ranks hold each; the evaluation at its end only."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    run = probed_run(few, folder, tensor_parallel_size=2, eval_every=2)
    assert run_ranks(4, train_here, run, small_ds(3)) == [""] * 4
    return folder


def test_the_numbers_do_not_depend_on_the_layout(
    few: Path, single: Path, sharded: Path, tmp_path: Path
) -> None:
    """Catches images that are counted twice or by no rank, weights that are not gathered, ranks that wait for
    one that has no images left."""
    run = probed_run(few, tmp_path / "run", eval_every=2)
    assert run_ranks(3, train_here, run, small_ds(2)) == [""] * 3
    for folder in (tmp_path / "run", sharded):
        (found,) = probed(folder)
        assert found == pytest.approx(probed(single)[-1], abs=1e-5)


def test_bf16(few: Path, single: Path, tmp_path: Path) -> None:
    """Catches features whose type the protocols cannot take."""
    run = probed_run(few, tmp_path / "run", max_steps=1)
    assert run_ranks(2, train_here, run, small_ds(3, **BF16)) == [""] * 2
    (found,), (expected, _) = probed(tmp_path / "run"), probed(single)
    assert found["knn10_top1"] == pytest.approx(expected["knn10_top1"], abs=0.15)


@pytest.mark.parametrize(("ranks", "stage", "protocols"), [(2, 3, "knn"), (1, 0, ALL)])
def test_training_is_the_same_to_the_bit(
    few: Path, tmp_path: Path, ranks: int, stage: int, protocols: str
) -> None:
    """Catches a pass over features that moves the data, random numbers, weights or gradients of training."""
    changes = {"max_steps": 3, "eval_every": 2, "model__dropout": 0.1}
    for name, tasks in (("probed", protocols), ("plain", "")):
        run = probed_run(few, tmp_path / name, tasks, **changes)
        assert run_ranks(ranks, train_here, run, small_ds(stage)) == [""] * ranks
    steps = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in steps_of(tmp_path / name)]
        for name in ("probed", "plain")
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    results = [[row for row in log_of(tmp_path / name) if "eval" in row] for name in ("probed", "plain")]
    for one, other in zip(*results, strict=True):
        assert one == other | {key: one[key] for key in one if key.startswith(starts("eval/val/"))}


def test_they_are_what_the_command_finds_on_the_export(
    few: Path, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches other crops, labels, rows or weights than those of the exported model."""
    words = [str(sharded), "--tasks", ALL, "--data", str(few), "--out", str(tmp_path / "out")]
    code = evaluate_command.main([*words, "--cache_dir", str(tmp_path / "cache"), "--quiet"])
    assert code == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    expected = {}
    for result in results:
        number = result["settings"].get("k", result["settings"].get("shots", ""))
        expected[f"{result['task']}{number}_{result['metric']}"] = result["value"]
    assert probed(sharded)[-1] == pytest.approx(expected, abs=1e-5)


def die_in_probes(run: RunConfig, raw: dict[str, Any], last: int) -> None:
    """In a rank: a run that is killed while the protocols work in the evaluation number `last`."""
    from megavit.evaluate.while_training import Probes

    results, done = Probes.results, 0

    def results_and_die(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        found = results(*arguments)
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Probes.results = results_and_die  # type: ignore[method-assign]
    train_here(run, raw)


def test_an_evaluation_that_was_killed_is_done_again_and_a_finished_one_is_not(
    few: Path, single: Path, tmp_path: Path
) -> None:
    """Catches results that a kill takes from a run, above all the final ones, and work that is done twice."""
    sets = {"data__val": (f"other={few}/other-0.tar",), "checkpoint__every": 1}
    run = probed_run(few, tmp_path / "run", **sets)
    with pytest.raises(AssertionError, match="ended with -9"):
        run_ranks(1, die_in_probes, run, small_ds(0), 2, fresh=True)  # on the second set after step 1
    first = [row for row in log_of(tmp_path / "run") if "eval" in row]
    assert [row["eval"] for row in first] == ["val"]
    assert run_ranks(1, train_here, run, small_ds(0)) == [""]
    rows = [row for row in log_of(tmp_path / "run") if "eval" in row]
    assert rows == [row for row in log_of(single) if "eval" in row] and rows[:1] == first
    assert run_ranks(1, train_here, run, small_ds(0)) == [""]  # nothing is left to do
    assert [row for row in log_of(tmp_path / "run") if "eval" in row] == rows


def test_a_run_that_goes_on_may_have_others(few: Path, tmp_path: Path) -> None:
    """Catches a saved run that cannot be measured otherwise than it was, and a change that is not said."""
    run = probed_run(few, tmp_path / "run", "", stop_at_step=1)
    assert run_ranks(1, train_here, run, small_ds(3)) == [""]
    run = dataclasses.replace(run, eval=EvalConfig("knn", train_samples=50), stop_at_step=0)
    assert run_ranks(1, train_here, run, small_ds(3)) == [""]
    (resumed,) = (row for row in log_of(tmp_path / "run") if row.get("event") == "resumed")
    assert resumed["changes"] == ["eval.tasks  -> knn", "eval.train_samples 10000 -> 50"]
    before, after = probed(tmp_path / "run")
    assert before == {} and after["knn20_top1"] > 0


def trained_output(run: RunConfig, raw: dict[str, Any], path: Path) -> str:
    """In a rank: `train_here`, with what it prints written to a file."""
    from contextlib import redirect_stdout

    with open(path, "w") as file, redirect_stdout(file):
        return train_here(run, raw)


def test_the_console_has_one_number_of_each_protocol(few: Path, tmp_path: Path) -> None:
    """Catches a line of 18 numbers, or one without any."""
    run = probed_run(few, tmp_path / "run", max_steps=1)
    assert run_ranks(1, trained_output, run, small_ds(3), tmp_path / "said") == [""]
    (line,) = (line for line in (tmp_path / "said").read_text().splitlines() if "evaluation on val" in line)
    assert all(f"{name} 0." in line for name in ("knn20_top1", "fewshot10_top1", "linear_top1")), line
    assert len(line) < 200 and "knn10_top1" not in line and "fewshot5" not in line, line


def train_with_inf(run: RunConfig, raw: dict[str, Any], path: Path) -> str:
    from contextlib import redirect_stdout

    raw["optimizer"]["params"]["lr"] = float("inf")
    with open(path, "w") as file, redirect_stdout(file):
        return train_here(run, raw)


def test_features_that_are_not_finite_do_not_end_the_run(few: Path, tmp_path: Path) -> None:
    """Catches a run that stops, or a number that means nothing, when its model is broken."""
    run = probed_run(few, tmp_path / "run")
    (error,) = run_ranks(1, train_with_inf, run, small_ds(3), tmp_path / "said")
    assert "its weights are not finite" in error  # what such a run ends with in any case
    said = (tmp_path / "said").read_text()
    assert "no more results of eval.tasks on val: the features of training images are not finite" in said
    assert probed(tmp_path / "run") == [{}, {}]


def write_labels(folder: Path, labels: str) -> str:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 100).save(buffer, "PNG")
    with wds.TarWriter(str(folder / "several-0.tar"), encoder=False, mtime=0) as tar:
        for number in range(30):
            tar.write({"__key__": f"{number:03}", "png": buffer.getvalue(), "json": labels.encode()})
    return f"{folder}/several-0.tar"


@pytest.mark.parametrize("part", ["shards", "val_shards"])
def test_images_of_several_classes_are_refused_before_training(few: Path, tmp_path: Path, part: str) -> None:
    """Catches a run that finds out after hours that its labels do not suit the protocols."""
    several = write_labels(tmp_path, "[1, 2]")
    run = probed_run(few, tmp_path / "run", "knn", **{f"data__{part}": several})
    for error in run_ranks(2, train_here, run, small_ds(3)):
        assert error.startswith("eval.tasks knn needs images that have one class each")
        assert several in error and "it has 2 labels" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def own_probed(few: Path, folder: Path, num_classes: int) -> str:
    """In a rank: a task of one's own that has no labels, and shards that have them for the protocols."""
    run = own_run(few, folder, model__num_classes=num_classes, **SHORT)
    return train_here(dataclasses.replace(run, eval=EvalConfig("knn,fewshot")), small_ds(3))


def write_own(folder: Path, with_label: bool) -> None:
    """The shards of the own task, with the labels of classes beside its numbers."""
    write_ink(folder)
    for name in ("train", "test"):
        path = folder / f"{name}-0.tar"
        samples = list(wds.WebDataset(str(path), shardshuffle=False))
        with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
            for number, sample in enumerate(samples):
                label = {"cls": str(number % 3).encode()} if with_label else {}
                members = {"__key__": sample["__key__"], "png": sample["png"], "json": sample["json"]}
                tar.write(members | label)


def test_a_task_of_ones_own_is_measured_too(tmp_path: Path) -> None:
    """Catches protocols that know classification only."""
    write_own(tmp_path, with_label=True)
    assert run_ranks(2, own_probed, tmp_path, tmp_path / "run", 3) == ["", ""]
    for name in ("val", "more"):
        for found in probed(tmp_path / "run", name):
            assert 0 <= found["knn20_top1"] <= 1 and "fewshot10_top1" in found


def test_a_task_without_labels_is_refused(tmp_path: Path) -> None:
    """Catches a traceback, or a run that ends at its first evaluation."""
    write_own(tmp_path, with_label=False)
    (error,) = run_ranks(1, own_probed, tmp_path, tmp_path / "run", 3)
    assert "eval.tasks knn,fewshot needs images that have one class each" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def without_trunk(few: Path, folder: Path) -> str:
    """In a rank: a task whose module calls its trunk otherwise."""
    from torch import nn

    from megavit.tasks.classify import Classify

    class Body(nn.Module):
        def __init__(self, trunk: nn.Module):
            super().__init__()
            self.body = trunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classify, "build", lambda self, init, recompute: Body(self.trunk(init, recompute)))
        return train_here(probed_run(few, folder, "knn"), small_ds(3))


def test_a_module_without_a_trunk_is_refused(few: Path, tmp_path: Path) -> None:
    """Catches an AttributeError at the first evaluation."""
    (error,) = run_ranks(1, without_trunk, few, tmp_path / "run", fresh=True)
    assert "eval.tasks knn needs a MegaVit called trunk in the task's module" in error
    assert "Body of task classify" in error and not (tmp_path / "run" / "log.jsonl").exists()


def test_flags_that_make_no_sense_are_refused(few: Path, tmp_path: Path) -> None:
    """Catches a wrong name that is left out silently, and protocols without images to test on."""
    with pytest.raises(ValueError, match=r"eval\.tasks has 'knnn'.*did you mean 'knn'"):
        EvalConfig("linear, knnn")
    with pytest.raises(ValueError, match=r"eval\.train_samples"):
        EvalConfig("knn", train_samples=0)
    with pytest.raises(ValueError, match=r"eval\.tasks needs validation images: .*--data\.val_shards"):
        probed_run(few, tmp_path, data__val_shards="")
    assert EvalConfig(" knn,linear ,knn,").names == ("knn", "linear")
