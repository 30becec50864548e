"""What a run tells people: lines while something takes long, and no number that means nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import resolve_ds_config, slow_parts
from megavit.train.evaluation import Evaluation
from megavit.train.logging import monitor
from megavit.train.logging.monitor import Monitor
from tests.train.runs import ds_config, small_run


@pytest.fixture
def quiet(tmp_path: Path) -> Monitor:
    """A monitor of a run on a CPU whose first step has not begun."""
    raw = resolve_ds_config(ds_config(3), 1, "cpu")
    return Monitor(tmp_path, small_run(tmp_path, tmp_path), raw, Mesh.single())


def log_step(of: Monitor, step: int) -> None:
    counts = {"bad_samples": 0, "skipped_updates": 0}
    of.log_step(step, loss=1.0, lr=1e-3, grad_norm=1.0, epoch=0.0, step_time_s=0.1, data_time_s=0.0, **counts)


def test_a_cpu_has_no_mfu(quiet: Monitor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches 'mfu 245%' on a CPU that was busy while its peak was measured."""
    quiet.open()
    log_step(quiet, 0)
    quiet.close()
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert row["mfu"] is None and math.isclose(row["images_per_s"], 480)
    said = capsys.readouterr().out
    assert "480 img/s  wait" in said and "mfu " not in said


def test_a_first_step_that_takes_long_is_said(
    quiet: Monitor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a minute of silence before the first line, and a line at every step."""
    monkeypatch.setattr(monitor, "_SLOW_STEP_S", 0.01)
    quiet.begin_step(4)
    assert quiet._first_step
    quiet._first_step.join()
    assert capsys.readouterr().out.startswith("  working on step 5, the first of this start, for ")
    log_step(quiet, 4)
    first = quiet._first_step
    quiet.begin_step(5)
    assert quiet._first_step is first


def test_a_first_step_that_is_quick_is_not_said(quiet: Monitor) -> None:
    """Catches a timer that speaks after the step has ended, or keeps a run that failed from ending."""
    quiet.begin_step(0)
    timer = quiet._first_step
    assert timer and timer.daemon and not timer.finished.is_set()
    log_step(quiet, 0)
    assert timer.finished.is_set()


def test_an_evaluation_that_takes_long_shows_how_far_it_is(
    quiet: Monitor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an hour of evaluation without a word, and a line for every batch."""
    show = quiet.evaluation_progress(1000)
    show(1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(monitor, "_PROGRESS_S", 0.0)
    show(2)
    assert capsys.readouterr().out.startswith("  evaluating: 2 of 1,000 batches, ")


def test_the_table_of_runs_has_the_final_results(quiet: Monitor, tmp_path: Path) -> None:
    """Catches results of an earlier evaluation, values that are no numbers, and a second run beside it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    quiet.open()
    quiet.log_eval(10, "early", Evaluation({"top1": 0.1}, 360, 0))
    log_step(quiet, 19)
    quiet.log_eval(20, "val", Evaluation({"top1": 0.9, "loss": math.nan}, 360, 0))
    quiet.log_hparams()
    quiet.close()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    board = EventAccumulator(str(folder))
    board.Reload()
    contents = [
        HParamsPluginData.FromString(board.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)
        for tag in ("session_start_info", "experiment")
    ]
    values = contents[0].session_start_info.hparams
    assert values["model.depth"].number_value == 2 and values["task.name"].string_value == "classify"
    assert math.isclose(values["ds.optimizer.params.lr"].number_value, 3e-3)
    metrics = [info.name.tag for info in contents[1].experiment.metric_infos]
    assert sorted(metrics) == ["eval/val/top1", "loss/train"]


def test_what_makes_a_start_slow_is_said_before_it_starts() -> None:
    """Catches a compiler, or bfloat16 on a CPU, that looks like a hang; and a note where there is neither."""

    def notes(device_type: str, own_adam: bool = False, bf16: bool = False, **zero: object) -> str:
        raw = ds_config(2, **zero) | {"bf16": {"enabled": bf16}}
        if own_adam:
            raw["optimizer"]["params"]["torch_adam"] = False
        return "\n".join(slow_parts(resolve_ds_config(raw, 1, device_type), device_type))

    assert notes("cpu") == notes("cuda", bf16=True) == ""
    assert "compiles its cpu_adam now" in notes("cpu", offload_optimizer={"device": "cpu"})
    assert "compiles its fused_adam now" in notes("cuda", own_adam=True, bf16=True)
    assert "--ds.bf16.enabled false trains in float32" in notes("cpu", bf16=True)
