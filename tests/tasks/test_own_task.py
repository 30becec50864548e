"""A task that lives in a file of its own, through the production loop: the seam that everything else of the
trainer must not look behind."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors.torch import load_file

from megavit.cli import parse_run
from megavit.model.vit import MegaVit
from megavit.tasks.config import load_task
from megavit.train.config import RunConfig
from tests.launch.commands import train_with
from tests.ranks import run_ranks
from tests.train.runs import DEMO, ds_config, log_of, small_run, steps_of, train_here

ROOT = Path(__file__).parents[2]
OWN = "tests/tasks/own_task.py:Ink"


def write_ink(folder: Path, train: int = 200, without: int | None = None) -> None:
    """Grey 8 x 8 pictures with their mean as a number in json; that `without` one of each split has none."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", 37)):
        with wds.TarWriter(str(folder / f"{split}-0.tar"), encoder=False, mtime=0) as tar:
            for number in range(count):
                pixels = random.integers(0, 256, (8, 8)) * random.random()
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
                value = {"ink": pixels.mean() / 255} if number != without else {}
                members = {"png": buffer.getvalue(), "json": json.dumps(value).encode()}
                tar.write({"__key__": f"{number:03}", **members})


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ink")
    write_ink(folder, without=5)
    return folder


@pytest.fixture(scope="module")
def trunk(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short run on the digits."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    assert run_ranks(1, train_here, small_run(digits, folder, max_steps=4), ds_config(3)) == [""]
    return folder / "export"


def own_run(ink: Path, folder: Path, **changes: Any) -> RunConfig:
    """12 steps of the own task on the trunk of `small_run`; a `val` set and one called `more`."""
    config = load_task(OWN).Config(name=str(ROOT / OWN))
    data = {"data__shards": f"{ink}/train-0.tar", "data__val_shards": f"{ink}/test-0.tar"}
    data |= {"data__val": (f"more@4={ink}/test-0.tar",), "data__max_bad_fraction": 0.1, "data__workers": 0}
    run = small_run(ink, folder, **{"max_steps": 12, "eval_every": 6} | data | changes)
    return dataclasses.replace(run, task=config)


def train_own(raw: dict[str, Any], ink: Path, folder: Path, changes: dict[str, Any]) -> str:
    """`train_here` of an `own_run`, made in the rank: the class of its task is known by its file's name
    there, and not here."""
    return train_here(own_run(ink, folder, **changes), raw)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in steps_of(folder)]


def results(folder: Path, name: str) -> dict[int, float]:
    """The errors that the evaluations on a validation set gave, by step."""
    return {row["step"]: row[f"eval/{name}/abs_error"] for row in log_of(folder) if row.get("eval") == name}


def saved_names(folder: Path) -> set[str]:
    """The tensors that the newest checkpoint holds."""
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return set(json.loads((newest / "manifest.json").read_text())["tensors"])


KILLED = """
import os, pickle, sys
sys.path.insert(0, os.getcwd())
from pathlib import Path
from megavit.train import loop
from tests.tasks.test_own_task import own_run
from tests.train.runs import ds_config, train_here

run_dir, ink, changes = pickle.load(open(sys.argv[1], "rb"))
log_saves = loop.Trainer._log_saves

def die_when_saved(self):
    log_saves(self)
    if self.step == 5:
        self.saver.wait()
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    loop.Trainer._log_saves = die_when_saved
    sys.exit(train_here(own_run(Path(ink), Path(run_dir), **changes), ds_config(3)))
"""


@pytest.mark.dist
@pytest.mark.slow
def test_it_trains_is_killed_goes_on_in_another_layout_evaluates_and_exports(
    ink: Path, trunk: Path, tmp_path: Path
) -> None:
    """Catches a trainer that knows more than its task: checkpoints, layouts, evaluations or exports which
    work for classification only; frozen weights that move, or that checkpoints hold."""
    frozen = {"freeze": "trunk", "init_from": str(trunk), "checkpoint__every": 4}
    # With a worker process, which has to import the task's file.
    with_worker = frozen | {"data__workers": 1}
    assert run_ranks(1, train_own, ds_config(3), ink, tmp_path / "whole", with_worker) == [""]

    run_dir, program, arguments = tmp_path / "run", tmp_path / "killed.py", tmp_path / "arguments"
    program.write_text(KILLED)
    arguments.write_bytes(pickle.dumps((str(run_dir), str(ink), frozen)))
    killed = subprocess.run([sys.executable, str(program), str(arguments)], cwd=ROOT)
    assert killed.returncode == -9
    # The export is not named again: the checkpoint knows where its frozen weights came from.
    resumed = frozen | {"init_from": "", "tensor_parallel_size": 2}
    assert run_ranks(4, train_own, ds_config(2, micro_batch=12), ink, run_dir, resumed) == [""] * 4

    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    (going_on,) = [row for row in log_of(run_dir) if row.get("event") == "resumed"]
    assert not [change for change in going_on["changes"] if change.startswith("task.")]
    assert saved_names(run_dir) == {"ink.weight", "ink.bias"}
    val, more = results(run_dir, "val"), results(run_dir, "more")
    assert (sorted(val), sorted(more)) == ([6, 12], [4, 8, 12])
    assert val[12] == more[12] < losses(run_dir)[0] ** 0.5
    row = next(row for row in log_of(run_dir) if row.get("eval") == "val")
    assert (row["eval/val/samples"], row["eval/val/bad"]) == (36, 1)
    assert all("train/abs_error" in row for row in steps_of(run_dir))

    before = MegaVit.from_pretrained(trunk).state_dict()
    after = MegaVit.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert "head.weight" not in after
    added = load_file(run_dir / "export" / "task.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in added.items()}
    assert shapes == {"ink.weight": (1, DEMO.model.dim), "ink.bias": (1,)}


CASES = [
    (1, 1, ds_config(0), "trunk"),
    (2, 2, ds_config(3), "trunk.embed,trunk.blocks.0"),
    (2, 1, ds_config(1), "trunk.embed,trunk.blocks.0"),
    (2, 1, ds_config(2) | {"bf16": {"enabled": True}}, "trunk.blocks"),
    (4, 2, ds_config(3) | {"bf16": {"enabled": True}}, "trunk.blocks.1,trunk.norm"),
    (2, 2, ds_config(0), "trunk.blocks.1,trunk.pool"),
    (2, 1, ds_config(3), "trunk.embed,trunk.blocks,trunk.norm"),
]


def train_frozen(
    ink: Path, folder: Path, raw: dict[str, Any], changes: dict[str, Any]
) -> tuple[set[str], set[str]]:
    """The names of the parameters that have moved in four steps, and of those that moments are kept of."""
    from megavit.parallel.mesh import Mesh
    from megavit.tasks.task import blank_samples
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine

    run = own_run(ink, folder, **changes)
    mesh = Mesh.from_environment(run.tensor_parallel_size)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)

    def weights() -> dict[str, torch.Tensor]:
        parts = engine.state.slices(moments=False, frozen=True)
        return {part.name: part.tensors["weight"].float().clone() for part in parts}

    before = weights()
    samples = blank_samples(engine.task, engine.micro_batch, mesh.device)
    torch.manual_seed(mesh.dp_rank)
    samples.fields["image"].random_(0, 256)
    inputs = [engine.task.inputs(samples, mesh, training=True)] * engine.grad_accum
    for _ in range(4):
        result = engine.train_step(inputs, torch.tensor(float(raw["train_batch_size"])), 1e-2)
        assert not result.refused and result.grad_norm > 0
    moved = {name for name, now in weights().items() if not torch.equal(now, before[name])}
    moments = {part.name for part in engine.state.slices() if part.tensors["exp_avg"].any()}
    return set().union(*mesh.gather(moved)), set().union(*mesh.gather(moments))


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp", "raw", "freeze"), CASES, ids=range(len(CASES)))
def test_frozen_modules_do_not_move_and_have_no_moments(
    ink: Path, tmp_path: Path, ranks: int, tp: int, raw: dict[str, Any], freeze: str
) -> None:
    """Catches weight decay on frozen weights, moments that are kept of them, and trained ones that stop
    learning because what they read is frozen, at every ZeRO stage and precision."""
    changes = {"freeze": freeze, "tensor_parallel_size": tp}
    with torch.device("meta"):
        model = MegaVit.from_config(dataclasses.replace(DEMO.model, depth=2, num_classes=0))
    parts = tuple(f"{part.removeprefix('trunk').lstrip('.')}" for part in freeze.split(","))
    trained = {name for name, _ in model.named_parameters() if not name.startswith(parts)}
    trained |= {"ink.weight", "ink.bias"}
    for moved, with_moments in run_ranks(ranks, train_frozen, ink, tmp_path / "run", raw, changes):
        assert moved == trained
        assert with_moments == trained


@pytest.mark.dist
@pytest.mark.slow
def test_an_export_that_has_changed_is_refused(ink: Path, trunk: Path, tmp_path: Path) -> None:
    """Catches a run that goes on with other frozen weights than it was trained on, and one that cannot be
    told where its export was moved to."""
    copy = tmp_path / "copy"
    shutil.copytree(trunk, copy)
    changes = {"freeze": "trunk", "checkpoint__every": 4, "eval_every": 0}
    changes |= {"data__val": (), "data__val_shards": ""}

    def train(**more: Any) -> str:
        (error,) = run_ranks(1, train_own, ds_config(3), ink, tmp_path / "run", changes | more)
        return error

    assert train(init_from=str(copy), stop_at_step=4) == ""
    file = copy / "model.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    error = train()
    assert "was written again" in error and str(copy) in error and "--init_from" in error
    shutil.rmtree(copy)
    error = train()
    assert str(copy) in error and "--init_from" in error
    assert "freeze is , was trunk" in train(init_from=str(trunk), freeze="")
    assert train(init_from=str(trunk)) == ""


def test_the_readme_shows_the_file_that_is_tested() -> None:
    """Catches a walk-through that has drifted from the task that works."""
    readme = (ROOT / "megavit" / "tasks" / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert shown == (ROOT / "tests" / "tasks" / "own_task.py").read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_the_readmes_command_runs(digits: Path, tmp_path: Path) -> None:
    """Catches a command that people cannot copy: wrong flags, a task that `main` does not find, results that
    are not logged."""
    readme = (ROOT / "megavit" / "tasks" / "README.md").read_text()
    (command,) = re.findall(r"```\n(python launch/train\.py .*?)```", readme, re.DOTALL)
    _, _, *argv = shlex.split(command.replace("\\\n", " "))
    argv[argv.index("--max_steps") + 1] = "3"
    for folder in ("ds_configs", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "ink").mkdir()
    write_ink(tmp_path / "ink", train=300)
    first = small_run(digits, tmp_path / "runs" / "digits", max_steps=1, model__depth=3)
    assert run_ranks(1, train_here, first, ds_config(3)) == [""]
    run = train_with([*argv, "--log_every", "1", "--data.workers", "0"], tmp_path / "command")
    assert run.code == 0, run.output
    trained = tmp_path / argv[argv.index("--run_dir") + 1]
    assert len(losses(trained)) == 3 and sorted(results(trained, "val")) == [3]
    exported = load_file(trained / "export" / "task.safetensors")
    assert sorted(exported) == ["ink.bias", "ink.weight"]
    assert MegaVit.from_pretrained(trained).config.depth == 3


START = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--model.name", "vit_tiny"]
START += ["--data.shards", "x.tar", "--max_steps", "3"]


def test_the_flags_are_those_of_the_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches a task's fields that no flag sets, and classification's that another task takes silently."""

    def task(*words: str) -> Any:
        return parse_run([*START, *words]).run.task

    given = task("--task", OWN, "--task.key", "weight")
    assert (given.name, given.key) == (OWN, "weight")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task:\n  name: {OWN}\n  key: height\n")
    assert task("--config", str(recipe)).key == "height"
    demo = str(ROOT / "launch" / "recipes" / "digits.yaml")
    assert task("--config", demo, "--task", OWN).key == "ink"
    assert task("--config", demo).loss == "sigmoid"
    with pytest.raises(SystemExit):
        task("--task", OWN, "--task.loss", "sigmoid")
    assert "--task.loss" in capsys.readouterr().err


BROKEN = {
    "missing.py:Mine": "there is no file",
    "empty.py:Mine": "has no class Mine",
    "wrong.py:Mine": "ZeroDivisionError",
    "half.py:Mine": "Mine must define build and inputs",
    "json.py:Mine": "another module is called json",
    "classfy": "did you mean 'classify'",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_cannot_be_used_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or another module, in place of a task's file, and a folder that stays in the way
    of other modules."""
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("\n1 / 0\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "half.py").write_text("from megavit.tasks.task import Task\nclass Mine(Task): ...\n")
    with pytest.raises(SystemExit):
        parse_run([*START, "--task", str(tmp_path / name) if ":" in name else name])
    error = capsys.readouterr().err
    assert BROKEN[name] in error and "Traceback" not in error
    assert name != "wrong.py:Mine" or "wrong.py:2" in error
    assert str(tmp_path) not in sys.path
