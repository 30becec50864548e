"""Refused updates: the limit, giving up, and going back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megavit.train.config import GuardConfig, RunConfig
from megavit.train.guard import Guard
from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here


def test_the_limit_follows_the_median_of_accepted_norms() -> None:
    """Catches a limit that spikes pull up, or that judges before it has seen enough."""
    guard = Guard(GuardConfig(max_grad_norm_ratio=5.0))
    for norm in range(1, 32):
        assert guard.limit == math.inf
        guard.record(True, float(norm))
    guard.record(True, 32.0)
    assert guard.limit == 5.0 * 16.5
    guard.record(False, 1e9)
    assert guard.limit == 5.0 * 16.5 and guard.skipped == guard.in_a_row == 1
    for _ in range(128):
        guard.record(True, 2.0)
    assert guard.limit == 10.0 and guard.in_a_row == 0


def test_its_state_survives_a_checkpoint() -> None:
    """Catches a resumed run that refuses other updates than the uninterrupted one."""
    guard = Guard(GuardConfig(max_grad_norm_ratio=3.0))
    for norm in range(40):
        guard.record(norm % 7 != 0, float(norm))
    again = Guard(GuardConfig(max_grad_norm_ratio=3.0), json.loads(json.dumps(guard.state())))
    assert (again.limit, again.skipped, again.in_a_row) == (guard.limit, guard.skipped, guard.in_a_row)


def train_with_poison(run: RunConfig, raw: dict[str, Any], poisoned: list[str]) -> str:
    """`train_here`, but images whose batch holds one of the `poisoned` slots (epoch:position) become NaN."""
    from megavit.tasks.classify import Classify, Inputs
    from megavit.tasks.task import DeviceBatch
    from megavit.train import loop

    original = Classify.inputs

    def inputs(task: Classify, samples: DeviceBatch, mesh: Any, *, training: bool) -> Inputs:
        made = original(task, samples, mesh, training=training)
        fields = samples.fields
        key = int(fields["label"].sum()) * 1000 + int(fields["image"].float().mean() * 100)
        Path(run.run_dir).mkdir(parents=True, exist_ok=True)
        with open(Path(run.run_dir) / "keys", "a") as file:
            file.write(f"{key}\n")
        return made._replace(images=made.images * torch.nan) if str(key) in poisoned else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classify, "inputs", inputs)
        patch.setattr(loop.Trainer, "_max_attention", lambda trainer, batch: None)  # asks for inputs too
        return train_here(run, raw)


@pytest.fixture(scope="module")
def keys(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What names the batches of the first 20 steps."""
    folder = tmp_path_factory.mktemp("keys") / "plain"
    assert run_ranks(1, train_with_poison, small_run(digits, folder), ds_config(3), []) == [""]
    return (folder / "keys").read_text().split()


@pytest.mark.dist
@pytest.mark.slow
def test_bad_steps_are_skipped_and_too_many_end_the_run(
    digits: Path, tmp_path: Path, keys: list[str]
) -> None:
    """Catches a NaN that ends a run by itself, skips that nobody counts, and a run that skips for ever."""
    run = small_run(digits, tmp_path / "run", guard__max_skipped=3)
    assert run_ranks(1, train_with_poison, run, ds_config(3), keys[4:6]) == [""]
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6]
    assert rows[-1]["skipped_updates"] == 2 and rows[-1]["loss"] < 3.3
    skipped = [row for row in log_of(tmp_path / "run") if row.get("event") == "skipped"]
    assert [row["step"] for row in skipped] == [5, 6] and "loss is nan" in skipped[0]["reason"]
    run = small_run(digits, tmp_path / "over", guard__max_skipped=3)
    (error,) = run_ranks(1, train_with_poison, run, ds_config(3), keys[4:9])
    assert "3 updates in a row were refused, the last at step 7" in error
    assert "--data.skip_steps 4:7" in error
    assert (tmp_path / "over" / "checkpoints" / "step_00000007" / "manifest.json").is_file()


@pytest.mark.dist
@pytest.mark.slow
def test_rollback_leaves_out_the_data_that_led_there(digits: Path, tmp_path: Path, keys: list[str]) -> None:
    """Catches a rollback to the wrong weights or data: it must equal a run that never saw the bad range."""
    rules = {"guard__max_skipped": 2, "guard__rollback": True, "checkpoint__every": 4}
    run = small_run(digits, tmp_path / "run", **rules)
    assert run_ranks(1, train_with_poison, run, ds_config(3), keys[9:13]) == [""]
    told = small_run(digits, tmp_path / "told", data__skip_steps="9:13")
    assert run_ranks(1, train_here, told, ds_config(3)) == [""]
    found, expected = steps_of(tmp_path / "run"), steps_of(tmp_path / "told")
    assert [(row["step"], row["loss"]) for row in found] == [(row["step"], row["loss"]) for row in expected]
    back = [row for row in log_of(tmp_path / "run") if row.get("event") == "rolled back"]
    assert [(row["step"], row["left_out"]) for row in back] == [(8, "9:11"), (8, "9:13")]
    discarded = (tmp_path / "run" / "log.jsonl.discarded").read_text()
    assert '"skipped"' in discarded
    # A later start knows the range without being told.
    resumed = small_run(digits, tmp_path / "run", max_steps=22, **rules)
    assert run_ranks(1, train_here, resumed, ds_config(3)) == [""]


@pytest.mark.dist
@pytest.mark.slow
def test_rollback_goes_behind_what_was_saved_while_updates_were_refused(
    digits: Path, tmp_path: Path, keys: list[str]
) -> None:
    """Catches a rollback to a checkpoint from inside the bad range, which leaves the first bad data in."""
    run = small_run(digits, tmp_path / "run", guard__max_skipped=3, guard__rollback=True, checkpoint__every=1)
    assert run_ranks(1, train_with_poison, run, ds_config(3), keys[4:7]) == [""]
    told = small_run(digits, tmp_path / "told", data__skip_steps="4:7")
    assert run_ranks(1, train_here, told, ds_config(3)) == [""]
    found, expected = steps_of(tmp_path / "run"), steps_of(tmp_path / "told")
    assert [(row["step"], row["loss"]) for row in found] == [(row["step"], row["loss"]) for row in expected]
    back = [row for row in log_of(tmp_path / "run") if row.get("event") == "rolled back"]
    assert [(row["step"], row["left_out"]) for row in back] == [(4, "4:7")]


@pytest.mark.dist
@pytest.mark.slow
def test_rollback_without_a_checkpoint_or_effect_ends_the_run(
    digits: Path, tmp_path: Path, keys: list[str]
) -> None:
    """Catches a run that goes round in circles, or back to a checkpoint that does not exist."""
    rules = {"guard__max_skipped": 2, "guard__rollback": True}
    run = small_run(digits, tmp_path / "none", checkpoint__every=0, **rules)
    (error,) = run_ranks(1, train_with_poison, run, ds_config(3), keys[4:9])
    assert "nothing was saved before the first of them" in error
    run = small_run(digits, tmp_path / "circles", checkpoint__every=4, **rules)
    (error,) = run_ranks(1, train_with_poison, run, ds_config(3), keys[4:])
    assert "3 rollbacks to step 4 did not help" in error
