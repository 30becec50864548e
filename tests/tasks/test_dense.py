"""Depth and segmentation through the production loop: layouts, kills, frozen trunks."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megavit.cli import parse_run
from megavit.model.config import ModelConfig
from megavit.model.vit import MegaVit
from megavit.tasks.config import DepthConfig, SegmentConfig, TaskConfig
from megavit.tasks.exported import load_dense
from megavit.tasks.metrics import confusion, segmentation_results
from megavit.train.config import RunConfig
from tests.ranks import run_ranks
from tests.tasks.dense_data import SIDE, scene, write_dense
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    image_size=SIDE, patch_size=4, channels=1, num_classes=0, dim=32, depth=4, num_heads=4, mlp_dim=64
)
HEADS: dict[str, TaskConfig] = {
    "dpt": DepthConfig(head="dpt", head_width=8, gradient=0.1),
    "depth linear": DepthConfig(head="linear", loss="silog"),
    "bins": DepthConfig(head="bins", crop="garg", align="median"),
    "linear": SegmentConfig(classes=3, layers="2", dice=0.5),
    "upernet": SegmentConfig(classes=3, head="upernet", head_width=8),
    "segmenter": SegmentConfig(classes=3, head="segmenter"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


def dense_run(data: Path, folder: Path, task: TaskConfig, **changes: Any) -> RunConfig:
    """8 steps, two epochs, of a small trunk, frozen, with mirrored and moved crops."""
    flat = {
        "freeze": "trunk",
        "data__shards": f"{data}/train-0.tar",
        "data__val_shards": f"{data}/test-0.tar",
    }
    flat |= {"data__workers": 0, "data__augment": "inception", "data__flip": True, "max_steps": 8}
    flat |= {"data__eval_crop": 1.0, "eval_every": 4}
    run = small_run(data, folder, **flat | changes)
    return dataclasses.replace(run, model=MODEL, task=task)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in steps_of(folder)]


def result(folder: Path, metric: str) -> float:
    rows = [row for row in log_of(folder) if row.get("eval") == "val"]
    found: float = rows[-1][f"eval/val/{metric}"]
    return found


def saved_names(folder: Path) -> set[str]:
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    return set(json.loads((newest / "manifest.json").read_text())["tensors"])


LAYOUTS = [(1, 1, 0, 48), (2, 1, 2, 24), (2, 2, 0, 48), (4, 2, 3, 24)]
LONG = ("dpt", "linear")  # heads that are compared for 20 steps, the others for 8, in the outermost layouts


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_that_of_one_process_in_every_layout(data: Path, tmp_path: Path, name: str) -> None:
    """Catches heads whose gradients are not summed or summed twice over TP, statistics of a rank's own
    images, units that are counted per rank, and evaluations that are not exact."""
    steps, layouts = (20, LAYOUTS) if name in LONG else (8, [LAYOUTS[0], LAYOUTS[-1]])
    found, results = [], []
    for number, (ranks, tp, stage, micro_batch) in enumerate(layouts):
        folder = tmp_path / str(number)
        changes = {"tensor_parallel_size": tp, "max_steps": steps, "eval_every": steps // 2}
        run = dense_run(data, folder, HEADS[name], **changes)
        raw = ds_config(stage, micro_batch=micro_batch)
        raw["optimizer"]["params"]["lr"] = 3e-4  # at a large one rounding grows tenfold every few steps
        assert run_ranks(ranks, train_here, run, raw) == [""] * ranks
        found.append(losses(folder))
        results.append(result(folder, "abs_rel" if isinstance(HEADS[name], DepthConfig) else "miou"))
    assert len(found[0]) == steps
    assert found[0][-1] < found[0][0]
    for other in found[1:]:
        assert other[:2] == pytest.approx(found[0][:2], rel=1e-6)
        assert other == pytest.approx(found[0], rel=1e-4)
    assert results == pytest.approx([results[0]] * len(layouts), rel=1e-3)


KILLED = """
import os, pickle, sys
sys.path.insert(0, os.getcwd())
from megavit.train import loop
from tests.train.runs import ds_config, train_here

run = pickle.load(open(sys.argv[1], "rb"))
log_saves = loop.Trainer._log_saves

def die_when_saved(self):
    log_saves(self)
    if self.step == 5:
        self.saver.wait()
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    loop.Trainer._log_saves = die_when_saved
    sys.exit(train_here(run, ds_config(3)))
"""


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_run_goes_on_in_another_layout_and_exports(data: Path, tmp_path: Path) -> None:
    """Catches running statistics that start again with a resumed run, or are lost in an export."""
    task = HEADS["linear"]
    changes = {"checkpoint__every": 4}
    whole = dense_run(data, tmp_path / "whole", task, **changes)
    assert run_ranks(1, train_here, whole, ds_config(3)) == [""]

    run = dense_run(data, tmp_path / "run", task, **changes)
    program, arguments = tmp_path / "killed.py", tmp_path / "arguments"
    program.write_text(KILLED)
    arguments.write_bytes(pickle.dumps(run))
    killed = subprocess.run([sys.executable, str(program), str(arguments)], cwd=ROOT, env=os.environ)
    assert killed.returncode == -9
    resumed = dataclasses.replace(run, tensor_parallel_size=2)
    assert run_ranks(4, train_here, resumed, ds_config(2, micro_batch=24)) == [""] * 4

    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert result(tmp_path / "run", "miou") == pytest.approx(result(tmp_path / "whole", "miou"), rel=1e-4)
    names = {f"decoder.norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
    names |= {"decoder.convolution.weight", "decoder.convolution.bias"}
    assert saved_names(tmp_path / "run") == names
    one, other = (load_file(tmp_path / name / "export" / "task.safetensors") for name in ("run", "whole"))
    assert set(one) == names
    for part in names:
        torch.testing.assert_close(one[part], other[part], rtol=1e-3, atol=1e-4)
    assert not torch.equal(one["decoder.norm.running_var"], torch.ones(MODEL.dim))
    assert MegaVit.from_pretrained(tmp_path / "run").config.num_classes == 0
    task, module = load_dense(tmp_path / "run")
    assert isinstance(task.config, SegmentConfig) and task.config.classes == 3
    matrix = torch.zeros(3, 3, dtype=torch.long)
    for picture, classes in scenes_of_test():
        images = torch.from_numpy(picture).float()[None, None] / 127.5 - 1
        with torch.no_grad():
            found = module.maps(images, torch.ones(1)).argmax(1)
        matrix += confusion(found[0], torch.from_numpy(classes), 3)
    assert segmentation_results(matrix)["miou"] == pytest.approx(result(tmp_path / "run", "miou"), abs=2e-3)


def scenes_of_test() -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures and classes of `test-0.tar`."""
    random = np.random.default_rng(0)
    scenes = [scene(random) for _ in range(200 + 21)]
    return [(picture, classes) for picture, _, classes in scenes[200:]]


def refuse(data: Path, folder: Path) -> list[bool]:
    """In a rank: whether statistics moved in a step that was refused, and in one that was not."""
    from megavit.parallel.mesh import Mesh
    from megavit.tasks.task import blank_samples
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment()
    engine = Engine(dense_run(data, folder, HEADS["linear"]), resolve_ds_config(ds_config(2), 1, "cpu"), mesh)
    samples = blank_samples(engine.task, engine.micro_batch, mesh.device)
    samples.fields["image"].random_(0, 256)
    samples.fields["mask"].random_(0, 3)
    inputs = engine.task.inputs(samples, mesh, training=True)
    moved = []
    for images in (torch.full_like(inputs.images, float("nan")), inputs.images):
        before = [statistic.clone() for statistic in engine.module.buffers()]
        engine.train_step([inputs._replace(images=images)], engine.task.weight(samples), 1e-3)
        moved.append(not all(map(torch.equal, before, engine.module.buffers())))
    return moved


@pytest.mark.dist
def test_a_refused_step_leaves_statistics_as_they_were(data: Path, tmp_path: Path) -> None:
    """Catches a batch of nan that the guard refuses, but that stays in the running statistics for ever."""
    assert run_ranks(1, refuse, data, tmp_path / "run") == [[False, True]]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpt", "linear", "upernet"])
def test_a_trained_trunk_learns_too(data: Path, tmp_path: Path, task: str) -> None:
    """Catches weights of the trunk that a decoder does not use (pooling) and that ZeRO waits for, and
    gradients that do not go through batch statistics of all ranks."""
    found = []
    for number, (ranks, tp, stage, micro_batch) in enumerate([LAYOUTS[0], LAYOUTS[3]]):
        folder = tmp_path / str(number)
        run = dense_run(data, folder, HEADS[task], freeze="", tensor_parallel_size=tp)
        raw = ds_config(stage, micro_batch=micro_batch)
        raw["optimizer"]["params"]["lr"] = 3e-4
        assert run_ranks(ranks, train_here, run, raw) == [""] * ranks
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


START = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--model.name", "vit_tiny"]
START += ["--data.shards", "x.tar", "--max_steps", "3", "--data.mixup", "0"]
MISTAKES = {
    ("--task", "segment"): "task.classes",
    ("--task", "segment", "--task.classes", "300"): "at most 255",
    ("--task", "depth", "--task.layers", "1,99,2,3"): "reads 4 of the blocks",
    ("--task", "depth", "--task.layers", "a"): "numbers of blocks",
    ("--task", "depth", "--task.min_m", "5", "--task.max_m", "2"): "below task.max_m",
    ("--task", "depth", "--data.mixup", "0.2"): "cannot blend",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches configurations that fail only when the engine is built."""
    with pytest.raises(SystemExit):
        parse_run([*START, *words])
    assert MISTAKES[words] in capsys.readouterr().err


def test_built_in_tasks_have_their_flags() -> None:
    """Catches a built-in task that --task does not find, and taps of other blocks than those that were
    named."""
    task = parse_run([*START, "--task", "depth", "--task.head", "bins", "--task.align", "median"]).run.task
    assert isinstance(task, DepthConfig) and (task.head, task.align) == ("bins", "median")
    assert DepthConfig().taps(48) == [11, 23, 35, 47]
    assert DepthConfig(layers="-1").taps(48) == [47] * 4
    assert SegmentConfig(classes=2, layers="44").taps(48) == [44]


def test_the_trunk_decides_the_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an export whose architecture has to be typed again, and a recipe's that is built instead."""
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(MODEL) | {"num_classes": 7}))
    recipe = ["--config", "launch/recipes/ade20k_linear.yaml", "--data.shards", "x.tar"]
    start = ["--deepspeed_config", "ds_configs/zero3_ade20k.json", *recipe, "--trunk", str(tmp_path)]
    run = parse_run([*start, "--model.image_size", "32"]).run
    assert run.model == dataclasses.replace(MODEL, image_size=32)
    assert (run.init_from, run.freeze) == (str(tmp_path), "trunk")
    assert parse_run(start).run.model.image_size == 504
    with pytest.raises(SystemExit):
        parse_run([*start[:-1], str(tmp_path / "nothing")])
    assert "--trunk" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_run([*start, "--init_from", "runs/other"])
    assert "two exports to start from" in capsys.readouterr().err


def test_classes_are_counted_from_their_names(tmp_path: Path) -> None:
    """Catches names of masks' classes that are taken for those of a classifier."""
    (tmp_path / "classes.txt").write_text("sky\nroad\ntree\n")
    words = [*START, "--data.shards", f"{tmp_path}/x.tar"]
    run = parse_run([*words, "--task", "segment"]).run
    assert isinstance(run.task, SegmentConfig) and run.task.classes == 3
    assert parse_run([*words, "--task", "depth"]).run.model.num_classes == 10  # the preset's


@pytest.mark.dist
def test_depth_of_unknown_unit_is_refused(tmp_path: Path) -> None:
    """Catches millimetres that are trained on as metres."""
    data = write_dense(tmp_path / "data", train=48)
    (data / "dense.json").unlink()
    run = dense_run(data, tmp_path / "run", HEADS["dpt"])
    (error,) = run_ranks(1, train_here, run, ds_config(2))
    assert "--task.scale" in error
