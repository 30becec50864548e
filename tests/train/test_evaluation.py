"""Evaluation while training: what counts, what is kept in memory, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from megavit.train.checkpoint.run_lock import LOCK_FILE
from megavit.train.config import RunConfig
from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

pytestmark = [pytest.mark.dist]


def evaluate_once(run: RunConfig) -> tuple[Any, int]:
    """What one evaluation of untrained weights finds, and the most batches of images alive at a time."""
    from megavit.data.bad import BadSamples
    from megavit.data.fields import Batch
    from megavit.parallel.mesh import Mesh
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine
    from megavit.train.evaluation import evaluate
    from megavit.train.inputs import eval_loader
    from megavit.train.watchdog import Watchdog

    mesh = Mesh.from_environment(run.tensor_parallel_size)
    resolved = resolve_ds_config(ds_config(3, batch=48, micro_batch=8), mesh.dp_size, "cpu")
    engine = Engine(run, resolved, mesh)
    loader = eval_loader(run.data.val_shards, engine.task, run.data, resolved, mesh)
    watchdog = Watchdog(600, "rank")
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Watched:
        num_samples = loader.num_samples

        def __iter__(self) -> Iterator[Batch]:
            nonlocal most
            for batch in loader:
                alive.append(weakref.ref(batch.fields["image"].untyped_storage()))
                most = max(most, sum(found() is not None for found in alive))
                yield batch

    found = evaluate(engine, Watched(), BadSamples(1, 1, 48), 0, watchdog)  # type: ignore[arg-type]
    watchdog.stop()
    return tuple(found), most


def write_validation(folder: Path, labels: list[str]) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 100).save(buffer, "PNG")
    with wds.TarWriter(str(folder / "test-0.tar"), encoder=False, mtime=0) as tar:
        for i, label in enumerate(labels):
            tar.write({"__key__": f"{i:03}", "png": buffer.getvalue(), "json": label.encode()})


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2), (3, 1)])
def test_images_without_a_label_are_no_part_of_top1(
    digits: Path, tmp_path: Path, ranks: int, tp: int
) -> None:
    """Catches unlabelled images that count as wrong, and evaluations that keep every image that they saw."""
    # All images are alike, so every prediction is class 0 of untrained weights.
    write_validation(tmp_path, ['{"labels": []}', "[0]", "[0, 3]", "[4]", "[99]"] * 8)
    val_shards = str(tmp_path / "test-0.tar")
    run = small_run(digits, tmp_path / "run", data__val_shards=val_shards, tensor_parallel_size=tp)
    for (results, samples, bad), most in run_ranks(ranks, evaluate_once, run):
        assert (samples, results["unlabelled"], bad) == (32, 8, 8)
        assert results["top1"] == pytest.approx(2 / 3)
        assert most <= 2


def train_and_die(run: RunConfig, raw: dict[str, Any], last: int) -> None:
    """In a rank: a run that is killed as the evaluation after step `last` begins."""
    from megavit.train import loop

    evaluate = loop.evaluate

    def evaluate_and_die(engine: Any, loader: Any, bad_samples: Any, step: int, *others: Any) -> Any:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(engine, loader, bad_samples, step, *others)

    loop.evaluate = evaluate_and_die
    train_here(run, raw)


IN_BETWEEN = {"max_steps": 12, "eval_every": 6, "checkpoint__every": 3}


@pytest.fixture(scope="module")
def never_killed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never_killed") / "run"
    run = small_run(digits, folder, data__val_shards=f"{digits}/test-*.tar", **IN_BETWEEN)
    assert run_ranks(1, train_here, run, ds_config(3)) == [""]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 12])
def test_an_evaluation_that_was_killed_is_done_by_the_next_start(
    digits: Path, never_killed: Path, tmp_path: Path, step: int
) -> None:
    """Catches evaluations that a kill removes from a run's results, the final one above all."""
    run = small_run(digits, tmp_path / "run", data__val_shards=f"{digits}/test-*.tar", **IN_BETWEEN)
    with pytest.raises(AssertionError, match="ended with -9"):
        run_ranks(1, train_and_die, run, ds_config(3), step, fresh=True)
    assert run_ranks(1, train_here, run, ds_config(3)) == [""]
    found, expected = [evaluations(folder) for folder in (tmp_path / "run", never_killed)]
    assert found == expected and [row["step"] for row in found] == [6, 12]
    assert steps_of(tmp_path / "run")[-1]["loss"] == steps_of(never_killed)[-1]["loss"]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in log_of(folder) if "eval" in row]


def train_twice(run: RunConfig, raw: dict[str, Any]) -> list[float | None]:
    from megavit.parallel.mesh import Mesh
    from megavit.train.loop import train
    from megavit.train.preempt import StopRequest

    mesh = Mesh.from_environment()
    return [train(run, raw, mesh, StopRequest()) for _ in range(2)]


@pytest.mark.slow
def test_a_finished_run_tells_its_result_without_evaluating_again(digits: Path, tmp_path: Path) -> None:
    """Catches a second start of a finished run that has no result, or spends an evaluation on it."""
    run = small_run(digits, tmp_path / "run", max_steps=4, data__val_shards=f"{digits}/test-*.tar")
    ((first, again),) = run_ranks(1, train_twice, run, ds_config(3))
    assert first is not None and first == again
    assert len(evaluations(tmp_path / "run")) == 1


def train_uselessly(run: RunConfig, raw: dict[str, Any], how: str) -> str:
    from megavit.parallel.mesh import Mesh
    from megavit.train import guard
    from megavit.train.loop import UselessRun, train
    from megavit.train.preempt import StopRequest

    with pytest.MonkeyPatch.context() as patch:
        if how == "refused":
            patch.setattr(guard.Guard, "limit", property(lambda self: 1e-9))
        else:
            raw["optimizer"]["params"]["lr"] = float("inf")
        try:
            train(run, raw, Mesh.from_environment(), StopRequest())
        except UselessRun as error:
            return str(error)
    return "exported"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("refused", "every one of its 4 updates was refused"),
        ("not finite", "its weights are not finite (3 of 4 updates"),
    ],
)
def test_a_run_that_learned_nothing_does_not_end_well(
    digits: Path, tmp_path: Path, how: str, words: str
) -> None:
    """Catches a run of refused updates, or of weights that are not numbers, that exports and exits with 0."""
    run = small_run(digits, tmp_path / "run", max_steps=4)
    (error,) = run_ranks(1, train_uselessly, run, ds_config(3), how)
    assert words in error and "log.jsonl" in error
    assert not (tmp_path / "run" / "export").exists()
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()


def fail_to_build(run: RunConfig, raw: dict[str, Any], error: str) -> str:
    from megavit.parallel.mesh import Mesh
    from megavit.train import loop
    from megavit.train.preempt import StopRequest

    class Engine:
        def __init__(self, *arguments: Any, **options: Any):
            raise RuntimeError(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Engine", Engine)
        try:
            loop.train(run, raw, Mesh.from_environment(), StopRequest())
        except loop.OutOfMemory as found:
            return str(found)
        except RuntimeError as found:
            return f"other: {found}"
    raise AssertionError("built")


def contents(run_dir: Path) -> dict[Path, bytes]:
    """The run's own files; the lock tells of the last start, failed or not."""
    return {path: path.read_bytes() for path in run_dir.glob("*.*") if path.name != LOCK_FILE}


@pytest.mark.slow
def test_a_failed_start_leaves_the_run_folder_as_it_was(digits: Path, tmp_path: Path) -> None:
    """Catches flags of a start that failed in the configuration of the run, and a traceback for want of
    memory."""
    run = small_run(digits, tmp_path / "run", max_steps=4)
    assert run_ranks(1, train_here, run, ds_config(3)) == [""]
    before = contents(tmp_path / "run")
    longer = dataclasses.replace(run, max_steps=9)
    no_memory = "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    (found,) = run_ranks(1, fail_to_build, longer, ds_config(3), no_memory)
    assert "out of memory while building the engine" in found and "launch/plan.py" in found
    (found,) = run_ranks(1, fail_to_build, longer, ds_config(3), "something else")
    assert found == "other: something else"
    assert contents(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["train_batch_size"] == 48
