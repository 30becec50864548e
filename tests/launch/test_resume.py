"""Stopping and going on, through the real launchers and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from launch import checkpoints
from megavit.train.checkpoint.folder import checkpoints_of, committed
from tests.data.shards import flip_bit
from tests.launch.commands import SHORT, TRAIN, Run, again, arguments, environment, starter, train
from tests.processes import command_of, descendants

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    run = train(tmp_path_factory.mktemp("whole") / "run", digits, *SHORT, "--checkpoint.every", "6")
    assert run.code == 0, run.output
    return run


def same_losses(run: Run, whole: Run) -> bool:
    """Bitwise, and every step once."""
    return [(row["step"], row["loss"]) for row in run.steps] == [
        (row["step"], row["loss"]) for row in whole.steps
    ]


@pytest.fixture(scope="module")
def stopped(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run = train(folder, digits, *SHORT, "--checkpoint.every", "6", "--stop_at_step", "12")
    assert run.code == 0 and "stopped at step 12" in run.output, run.output
    return run


@pytest.fixture
def half(stopped: Run, tmp_path: Path) -> Run:
    """A copy of its own of the run that stopped."""
    return Run(0, "", Path(shutil.copytree(stopped.folder, tmp_path / "run", symlinks=True)))


def test_a_run_folder_goes_on_by_itself_and_bitwise(whole: Run, half: Run) -> None:
    """Catches flags that must be repeated, steps done twice, state that is not restored to the bit."""
    resumed = again(half)
    assert resumed.code == 0 and "going on after step 12" in resumed.output, resumed.output
    assert same_losses(resumed, whole)
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    manifests = [
        json.loads((run.folder / "checkpoints/step_00000020/manifest.json").read_text())
        for run in (whole, half)
    ]
    assert manifests[0]["optimizer"] == manifests[1]["optimizer"]
    decay = {group["name"]: group["weight_decay"] for group in manifests[1]["optimizer"]["groups"]}
    assert decay == {"body": 0.05, "head": 0.05, "no_decay": 0.0}
    assert set(manifests[1]["optimizer"]["steps"].values()) == {20}
    finished = again(half)
    assert finished.code == 0 and "nothing is left to do" in finished.output
    assert same_losses(finished, whole)


def test_damage_is_named_and_survived_if_told_so(whole: Run, half: Run) -> None:
    """Catches a damaged checkpoint that is trained on, or that ends a run which has an older one."""
    newest = committed(checkpoints_of(half.folder))[-1]
    file = newest / "rank_00000.safetensors"
    flip_bit(file, file.stat().st_size // 2)
    stopped = again(half)
    assert stopped.code == 1 and f"{file.relative_to(half.folder)} is damaged" in stopped.output
    assert "--checkpoint.on_damage previous" in stopped.output and "Traceback" not in stopped.output
    resumed = again(half, "--checkpoint.on_damage", "previous")
    assert resumed.code == 0 and "going on after step 6" in resumed.output, resumed.output
    assert newest.with_name(newest.name + ".damaged").is_dir()
    assert same_losses(resumed, whole)


def start(run_dir: Path, digits: Path, *flags: str, ranks: int | None) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        [*starter(ranks), TRAIN, *arguments(run_dir, digits, *flags)],
        cwd=run_dir.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
            return
    raise AssertionError("the run ended before")


@pytest.mark.parametrize(("name", "ranks", "workers"), [("USR1", None, 2), ("TERM", 2, 0)])
def test_a_stop_signal_saves_and_the_next_start_goes_on(
    whole: Run, digits: Path, tmp_path: Path, name: str, ranks: int | None, workers: int
) -> None:
    """Catches lost steps, ranks that stop at different steps, and data workers that die of the signal."""
    run_dir = tmp_path / "run"
    flags = [*SHORT, "--checkpoint.every", "0", "--data.workers", str(workers), "--eval_every", "0"]
    process = start(run_dir, digits, *flags, ranks=ranks)
    wait_for_step(process, 3)
    if ranks is None:
        os.killpg(process.pid, signal.Signals[f"SIG{name}"])
    else:  # as a launcher or SLURM does: every process of the ranks, but not the launcher itself
        for pid in descendants(process.pid):
            if "launch/train.py" in command_of(pid) and "deepspeed.launcher" not in command_of(pid):
                os.kill(pid, signal.Signals[f"SIG{name}"])
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert f"SIG{name}: saving step" in output
    assert (run_dir / "PREEMPTED").is_file()
    resumed = again(Run(0, output, run_dir), "--tensor_parallel_size", "1")
    assert resumed.code == 0, resumed.output
    assert not (run_dir / "PREEMPTED").exists()
    if ranks is None:
        assert same_losses(resumed, whole)
    for mine, theirs in zip(resumed.steps, whole.steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_checkpoints_command(
    half: Run, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a list, check or comparison that does not say what is on the disk."""

    def ask(*words: str) -> tuple[int, str]:
        code = checkpoints.main(words)
        said = capsys.readouterr()
        return code, said.out + said.err

    code, listed = ask("list", str(half.folder))
    assert code == 0 and "* step_00000012" in listed and "step_00000006" in listed
    code, checked = ask("verify", str(half.folder))
    assert code == 0 and checked.count("all well") == 2
    code, apart = ask("diff", str(half.folder))
    assert code == 1 and "updates 6 against 12" in apart
    code, equal = ask("diff", str(half.folder), str(whole.folder), "--steps", "12", "12")
    assert code == 0 and "all: weight 0, exp_avg 0, exp_avg_sq 0" in equal, equal
    file = half.folder / "checkpoints/step_00000006/rank_00000.safetensors"
    flip_bit(file, 5000)
    code, checked = ask("verify", str(half.folder))
    assert code == 1 and f"{file} is damaged" in checked
    code, missing = ask("list", str(tmp_path))
    assert code == 1 and "holds no checkpoints" in missing
