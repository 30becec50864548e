"""A run from its command line on, in a test rank: what the run folder keeps of it."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import pytest
import yaml

from launch.train import main
from megavit.train.config import RunConfig
from megavit.train.logging import monitor
from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

pytestmark = [pytest.mark.dist, pytest.mark.slow]
START = ["--deepspeed_config", "ds_configs/zero3.json", "--model.depth", "1", "--data.val_shards="]


def train(words: list[str]) -> tuple[int, str]:
    """In a test rank: the exit status and the output of `launch/train.py`."""
    monitor._PROGRESS_S = 0  # every batch of an evaluation takes long
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(words)
    return status, out.getvalue()


def test_epochs_and_values_of_the_json_stay_with_the_run(digits: Path, tmp_path: Path) -> None:
    """Catches a schedule that does not know how long the run is, a value that is replaced on the way to the
    engine only, and a second start that forgets both, or changes them without a word."""
    run_dir = tmp_path / "run"
    where = [*START[:2], "--run_dir", str(run_dir), "--data.workers", "0"]
    first = [
        *(
            *where,
            *START[2:],
            "--config",
            "launch/recipes/digits.yaml",
            "--data.shards",
            f"{digits}/train-*.tar",
        ),
        *("--epochs", "1.5", "--ds.train_batch_size", "512", "--ds.optimizer.params.lr", "1e-4"),
        *("--stop_at_step", "2", "--log_every", "1", "--schedule.warmup_steps", "0"),
    ]
    ((status, output),) = run_ranks(1, train, first)
    assert status == 0, output
    assert "epochs 1.5 of 1,437 samples are max_steps 5 with a global batch of 512" in output
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (saved["max_steps"], saved["epochs"]) == (5, 0)
    assert saved["ds"] == {"train_batch_size": 512, "optimizer.params.lr": 1e-4}
    ds_config = json.loads((run_dir / "ds_config.json").read_text())
    assert (ds_config["train_batch_size"], ds_config["optimizer"]["params"]["lr"]) == (512, 1e-4)

    ((status, output),) = run_ranks(1, train, [*where, "--stop_at_step", "3"])
    assert status == 0 and "note: --ds.optimizer.params.lr 0.0001" in output, output
    assert "/5  loss" in output and "changed" not in output
    rates = [row["lr"] for row in steps_of(run_dir)]
    assert len(rates) == 3 and rates[0] == 1e-4 and rates[2] < 1e-4

    longer = [*where, "--epochs", "2", "--ds.optimizer.params.lr=2e-4"]
    longer += ["--data.val_shards", f"{digits}/test-*.tar", "--ds.train_micro_batch_size_per_gpu", "256"]
    ((status, output),) = run_ranks(1, train, longer)
    assert "evaluating: 1 of 2 batches" in output and "evaluating: 2 of 2 batches" in output
    assert status == 0 and "changed: max_steps 5 -> 6" in output, output
    (changes,) = [row["changes"] for row in log_of(run_dir) if row.get("event") == "resumed"][-1:]
    assert changes[1:] == ["deepspeed.optimizer.params.lr 0.0001 -> 0.0002", "max_steps 5 -> 6"]
    assert len(steps_of(run_dir)) == 6


def workers_left(run: RunConfig) -> int:
    """In a test rank: how many data workers are there after the run."""
    assert train_here(run, ds_config(0)) == ""
    left = multiprocessing.active_children()
    for process in left:
        process.kill()  # else the end of this process waits for them
    return len(left)


def test_data_workers_end_with_their_run(digits: Path, tmp_path: Path) -> None:
    """Catches workers that the garbage collector finds in a cycle: it ends the thread that would tell them to
    stop before it asks for that, and a program that trains twice waits for ten seconds a worker."""
    assert run_ranks(1, workers_left, small_run(digits, tmp_path, max_steps=2, data__workers=2)) == [0]
