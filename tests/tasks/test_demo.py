"""What `make dense` is made of: shards out of installed packages, recipes, commands. That the decoders learn
something is in test_real.py."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import stereo_motorcycle
from sklearn.datasets import load_digits

from megavit.cli import parse_run
from megavit.data import write_demo
from megavit.data.plane_facts import PlaneFacts
from megavit.data.write import DataSet
from megavit.launch.shards import main as shards
from megavit.model.config import model_preset
from megavit.tasks.config import DepthConfig, SegmentConfig, VideoConfig
from megavit.tasks.metrics import confusion, depth_metrics, per_image, segmentation_results
from tests.launch.commands import train_with

ROOT = Path(__file__).parents[2]


def samples(found: DataSet, split: str) -> list[dict[str, np.ndarray]]:
    (part,) = (one for one in found.splits if one.name == split)
    members = [part.load(i) for i in range(part.size)]
    return [{name: np.asarray(Image.open(io.BytesIO(data))) for name, data in one.items()} for one in members]


def test_the_photo_is_cut_where_it_should_be_and_its_depth_is_in_millimetres() -> None:
    """Catches test pixels that are trained on, a depth that is mirrored or of another place, and one without
    the offset of the optical axes."""
    found = write_demo.motorcycle_set()
    train, test = samples(found, "train"), samples(found, "test")
    photo, _, disparity = stereo_motorcycle()
    rows, columns = (((np.arange(128) + 0.5) * side / 128).astype(int) for side in (500, 222))
    assert len(test) == 1 and round(0.7 * 741) == 519 and 519 + 222 == 741
    for one, left in ((train[0], 0), (train[-1], 297), (test[0], 519)):
        # Pictures are averaged, so that only their colours' sums are the photo's.
        strip = photo[:, left : left + 222]
        assert one["png"].mean((0, 1)) == pytest.approx(strip.mean((0, 1)), abs=0.6)
        depth, ours = one["depth.png"] / 1000, disparity[rows][:, left + columns]
        assert np.array_equal(depth > 0, np.isfinite(ours))
        # In similar triangles, focal length / depth is (disparity + offset) / baseline.
        known = depth > 0
        assert np.abs(994.978 * 193.001e-3 / depth[known] - ours[known] - 31.086).max() < 0.05
    assert found.planes["depth"] == PlaneFacts(scale=0.001, invalid=0, max_m=6)


def test_the_baselines_of_depth_are_measured_as_a_run_is() -> None:
    """Catches a bar that is lower than that of a constant."""
    found = write_demo.motorcycle_set()
    assert found.baselines
    told = found.baselines()
    assert told["metric"] == "abs_rel" and not told["higher_is_better"]
    _, depth = write_demo.motorcycle()
    left = depth[:, :519]
    truth = torch.from_numpy(samples(found, "test")[0]["depth.png"] / 1000).float()[None]
    guess = torch.full_like(truth, float(np.median(left[left > 0])) / 1000)
    sums = depth_metrics(guess, truth, truth > 0, limits=(1e-3, 6.0), align="none")
    assert told["results"]["median"] == pytest.approx(per_image(sums)["abs_rel"], abs=1e-3)
    assert told["results"]["median of each row"] < told["results"]["median"]


def test_mosaics_show_the_digits_of_their_masks() -> None:
    """Catches masks of another digit or quadrant, and mosaics of digits that were trained on."""
    found, digits = write_demo.mosaics_set(), load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    masks = np.where(digits.images >= 6, digits.target[:, None, None], 10)
    for split, part in (("train", slice(0, 1437)), ("test", slice(1437, None))):
        ours = samples(found, split)
        assert np.array_equal([one["png"] for one in ours], pictures[part])
        assert np.array_equal([one["mask.png"] for one in ours], masks[part])
    mosaics = samples(found, "mosaics")
    assert len(mosaics) == 200
    for one in mosaics[::20]:
        assert one["png"].shape == one["mask.png"].shape == (16, 16)
        for row, column in np.ndindex(2, 2):
            place = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            same = (pictures[1437:] == one["png"][place]).all((1, 2))
            assert np.array_equal(masks[1437:][same][0], one["mask.png"][place])
    assert found.baselines
    truth = torch.from_numpy(masks[1437:])
    alone = segmentation_results(confusion(torch.full_like(truth, 10), truth, 11))
    assert found.baselines()["results"]["background"] == pytest.approx(alone["miou"], abs=1e-6)


def commands(trunk: str) -> list[list[str]]:
    """The words after `python launch/` in `make dense`, with `trunk` for the newest export."""
    told = subprocess.run(["make", "-n", "dense"], cwd=ROOT, text=True, capture_output=True, check=True)
    lines = told.stdout.replace("\\\n", " ").splitlines()
    found = [re.search(r"\bpython launch/(.*)", re.sub(r'"\$\(ls .*?\)"', trunk, line)) for line in lines]
    return [shlex.split(one[1]) for one in found if one]


def test_the_commands_of_make_dense_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a flag that was renamed, a recipe whose shards nobody writes, and runs that `make evaluate`
    would take for the demo's."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(model_preset("vit_tiny"))))
    lines = commands(str(tmp_path))
    tasks = []
    for script, *words in lines:
        if script == "train.py":
            run = parse_run(words).run
            tasks.append((type(run.task), run.init_from))
            assert run.run_dir.startswith("runs/dense-")
            folder = Path(run.data.shards).parent
            # Shards that are there already are not written again.
            assert ["shards.py", folder.name, "--out", str(folder)] in lines or folder.is_dir()
    demo = str(tmp_path)
    assert tasks == [
        (DepthConfig, ""),
        (SegmentConfig, ""),
        (SegmentConfig, demo),
        (VideoConfig, demo),
        (VideoConfig, demo),
    ]


@pytest.mark.slow
def test_each_recipe_runs_and_leaves_pictures(tmp_path: Path) -> None:
    """Catches shards that a recipe cannot read, and a demo that shows nothing."""
    for name, metric, rows in (("motorcycle", "abs_rel", 1), ("mosaics", "miou", 2)):
        data = tmp_path / name
        assert shards([name, "--out", str(data), "--workers", "2"]) == 0
        words = ["--deepspeed_config", str(ROOT / "ds_configs/zero3_fp32.json")]
        words += ["--config", str(ROOT / "launch" / "recipes" / f"{name}.yaml"), "--max_steps", "2"]
        words += ["--ds.train_batch_size", "8", "--schedule.warmup_steps", "0"]
        words += ["--data.shards", f"{data}/train-*.tar", "--data.val_shards", f"{data}/test-*.tar"]
        run = train_with([*words, "--run_dir", str(tmp_path / f"{name}-run")], tmp_path / f"{name}-run")
        assert run.code == 0, run.output
        assert f"eval/val/{metric}" in run.evaluations[-1]
        assert run.output.index("this run") > run.output.index(f"final {metric}")
        picture = Image.open(run.folder / "pictures" / "step_00000002_val.png")
        assert picture.width > 4 * 128 and picture.height > rows * 128
        assert (run.folder / "export" / "task.safetensors").is_file()
