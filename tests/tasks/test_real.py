"""What the recipes of `make dense` learn, against what is known without looking at the picture. Trains for
minutes: a part of `make test-cluster`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megavit.data.write_demo import BACKGROUND, mosaics_set
from megavit.launch.shards import main as shards
from megavit.recipe import RECIPES
from megavit.tasks.exported import load_dense
from megavit.tasks.metrics import confusion, segmentation_results
from megavit.tasks.windows import sliding_window
from tests.launch.commands import ROOT, Run, train, train_with
from tests.tasks.test_demo import samples

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def run_recipe(name: str, folder: Path, batch: int, *flags: str) -> Run:
    """The recipe's run in `folder`, on shards beside it."""
    data = folder.parent / name
    assert shards([name, "--out", str(data), "--workers", "1"]) == 0
    words = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3_fp32.json")]
    words += ["--ds.train_batch_size", str(batch), "--config", str(RECIPES / f"{name}.yaml")]
    words += ["--data.shards", f"{data}/train-*.tar", "--data.val_shards", f"{data}/test-*.tar"]
    run = train_with([*words, "--run_dir", str(folder), *flags], folder)
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="module")
def demo(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(tmp_path_factory.mktemp("runs") / "demo", digits)
    assert run.code == 0, run.output
    return run


@pytest.mark.parametrize("seed", range(3))
def test_depth_is_better_than_that_of_each_row(tmp_path: Path, seed: int) -> None:
    """Catches a decoder that learns where things are in the picture only, or nothing: the median of all
    training pixels has AbsRel .213, and that of each row .176."""
    run = run_recipe("motorcycle", tmp_path / "run", 16, "--seed", str(seed))
    assert run.evaluations[-1]["eval/val/abs_rel"] < 0.176


def test_only_the_order_of_frames_tells_where_a_digit_moves(demo: Run, tmp_path: Path) -> None:
    """Catches videos of which one frame tells the direction, frames in another order than the video's, and a
    head that does not look at their order. By chance a quarter of the answers are right, and half of them if
    the axis is known."""
    heads = {
        "temporal": [],
        "attentive": ["--task.head", "attentive"],
        "one frame": ["--task.head", "attentive", "--task.frames", "1"],
        "no order": ["--task.head", "attentive", "--task.time_embedding", "false"],
    }
    found = {}
    for name, flags in heads.items():
        words = ["--trunk", str(demo.folder), "--ds.optimizer.params.lr", "3e-3", *flags]
        run = run_recipe("moving_digits", tmp_path / name, 32, *words)
        found[name] = run.evaluations[-1]["eval/val/top1"]
    assert min(found["temporal"], found["attentive"]) > 0.8, found
    assert found["one frame"] < 0.33 and found["no order"] < 0.65, found


def test_a_trunk_that_knows_digits_segments_them(demo: Run, tmp_path: Path) -> None:
    """Catches a trunk that is not loaded, or whose patches say no more than those of random weights do."""
    runs = {"digits": ["--trunk", str(demo.folder)], "random": []}
    found = {}
    for name, flags in runs.items():
        run = run_recipe("mosaics", tmp_path / name, 64, *flags)
        found[name] = on_mosaics(run.folder)["miou"]
        assert found[name] == pytest.approx(run.evaluations[-1]["eval/val/miou"], abs=0.05)
    assert found["digits"] > 0.3 and found["digits"] > found["random"] + 0.1


@torch.no_grad()
def on_mosaics(run_dir: Path) -> dict[str, float]:
    """The results of a run on mosaics of digits that it has not seen, in windows of the trunk's size."""
    task, module = load_dense(run_dir)
    found = samples(mosaics_set(), "mosaics")
    images = torch.from_numpy(np.stack([one["png"] for one in found])).float()[:, None] / 127.5 - 1
    truth = torch.from_numpy(np.stack([one["mask.png"] for one in found])).long()
    size, weights = task.model.image_size, torch.ones(len(images))
    maps = sliding_window(lambda windows: module.maps(windows, weights), images, size, size)
    return segmentation_results(confusion(maps.argmax(1), truth, BACKGROUND + 1))
