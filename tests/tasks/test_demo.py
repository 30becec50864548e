"""What `make dense` is made of: shards out of installed packages, recipes, commands. That the decoders learn
something is in test_real.py."""

from __future__ import annotations

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
from sklearn.datasets import load_digits
from skimage.data import stereo_motorcycle

from megavit.cli import parse_run
from megavit.data import write_demo
from megavit.data.write import DataSet
from megavit.launch.shards import main as shards
from megavit.tasks.config import DepthConfig, SegmentConfig
from megavit.tasks.metrics import confusion, depth_metrics, segmentation_results
from tests.launch.commands import train_with

ROOT = Path(__file__).parents[2]


def samples(found: DataSet, split: str) -> list[dict[str, np.ndarray]]:
    (part,) = (one for one in found.splits if one.name == split)
    members = [part.load(i) for i in range(part.size)]
    return [
        {name: np.asarray(Image.open(io.BytesIO(data))) for name, data in one.items()} for one in members
    ]


def places(photo: np.ndarray, squares: list[np.ndarray]) -> list[tuple[int, int]]:
    """Top and left of each square in the photo, where it is found again."""
    found = []
    for square in squares:
        height, width = square.shape[:2]
        starts = (photo[:-height + 1, :-width + 1] == square[0, 0]).all(-1)
        hits = [
            (int(y), int(x))
            for y, x in zip(*np.nonzero(starts), strict=True)
            if np.array_equal(photo[y : y + height, x : x + width], square)
        ]
        assert len(hits) == 1
        found += hits
    return found


def test_the_photo_is_cut_where_it_should_be_and_its_depth_is_in_millimetres() -> None:
    """Catches test pixels that are trained on, parts of the photo that are in neither, a depth that is
    mirrored or of another place, and one without the offset of the optical axes."""
    found = write_demo.motorcycle_set()
    train, test = samples(found, "train"), samples(found, "test")
    photo, _, disparity = stereo_motorcycle()
    corners = places(photo, [one["png"] for one in train[:: len(train) // 12] + train[-1:]])
    assert max(x for _, x in corners) + 222 == round(0.7 * 741) and min(corners) == (0, 0)
    assert places(photo, [one["png"] for one in test]) == [(y, 519) for y in (0, 139, 278)]
    assert found.planes["depth"].scale == 0.001 and found.planes["depth"].invalid == 0
    depth = test[0]["depth.png"] / 1000
    ours = disparity[:222, 519:741]
    assert np.array_equal(depth > 0, np.isfinite(ours))
    # Of two windows of a pixel in both pictures, focal length / depth is disparity / baseline.
    assert np.abs(994.978 * 193.001e-3 / depth - ours - 31.086)[depth > 0].max() < 0.05
    everything = np.concatenate([one["depth.png"][one["depth.png"] > 0] for one in train + test])
    assert 2.0 < everything.min() / 1000 < 2.2 and 4.9 < everything.max() / 1000 < 5.1


def test_the_baselines_of_depth_are_measured_as_a_run_is() -> None:
    """Catches a bar that is lower than that of a constant."""
    found = write_demo.motorcycle_set()
    assert found.baselines
    told = found.baselines()
    assert told["metric"] == DepthConfig().name.replace("depth", "abs_rel") and not told["higher_is_better"]
    photo, depth = write_demo.motorcycle()
    left = depth[:, :519]
    truth = torch.from_numpy(np.stack([one["depth.png"] for one in samples(found, "test")]) / 1000).float()
    guess = torch.full_like(truth, float(np.median(left[left > 0])) / 1000)
    sums = depth_metrics(guess, truth, truth > 0, limits=(1e-3, 6.0))
    assert told["results"]["median"] == pytest.approx(float(sums["abs_rel"]) / 3, abs=1e-5)
    assert told["results"]["median of each row"] < told["results"]["median"]


def test_mosaics_show_the_digits_of_their_masks() -> None:
    """Catches masks of another quadrant, and digits in test that were trained on."""
    found, digits = write_demo.mosaics_set(), load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for split, part in (("train", slice(0, 1437)), ("test", slice(1437, None))):
        for one in samples(found, split)[::40]:
            assert one["png"].shape == one["mask.png"].shape == (16, 16)
            for row, column in np.ndindex(2, 2):
                place = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                (mine, *_) = np.nonzero((pictures[part] == one["png"][place]).all((1, 2)))[0]
                ink = digits.images[part][mine] >= 6
                expected = np.where(ink, digits.target[part][mine], 10)
                assert np.array_equal(one["mask.png"][place], expected)
    assert found.baselines
    truth = torch.from_numpy(np.stack([one["mask.png"] for one in samples(found, "test")]))
    alone = segmentation_results(confusion(torch.full_like(truth, 10).long(), truth.long(), 11))
    assert found.baselines()["results"]["background"] == pytest.approx(alone["miou"], abs=1e-6)


def commands() -> list[list[str]]:
    """The words of every `python launch/...` that `make dense` runs, with a run of the demo for `$run`."""
    told = subprocess.run(
        ["make", "-n", "dense"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.replace("\\\n", " ")
    found = re.findall(r"python launch/(.*?)(?:&&|\n)", told)
    return [shlex.split(one.replace("${run%/export}", "$run")) for one in found]


def test_the_commands_of_make_dense_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a flag that was renamed, and a recipe without its shards."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps({"name": "vit_tiny", "image_size": 8, "patch_size": 2}))
    lines = commands()
    tasks = []
    for script, *words in lines:
        if script == "train.py":
            words = [str(tmp_path) if "$run" in word else word for word in words]
            run = parse_run(words).run
            tasks.append(type(run.task))
            assert run.run_dir.startswith("runs/dense/")
            folder = Path(run.data.shards).parent.name
            assert ["shards.py", folder, "--out", f"data/{folder}"] in lines
    assert tasks == [DepthConfig, SegmentConfig, SegmentConfig]


@pytest.mark.dist
@pytest.mark.slow
def test_each_recipe_runs_and_leaves_pictures(tmp_path: Path) -> None:
    """Catches shards that a recipe cannot read, and a demo that shows nothing."""
    for name, metric, sheet in (("motorcycle", "abs_rel", 2), ("mosaics", "miou", 2)):
        data = tmp_path / name
        assert shards([name, "--out", str(data), "--workers", "2"]) == 0
        words = ["--deepspeed_config", str(ROOT / "ds_configs/zero3_fp32.json")]
        words += ["--config", str(ROOT / "launch" / "recipes" / f"{name}.yaml"), "--max_steps", "2"]
        words += ["--ds.train_batch_size", "8", "--schedule.warmup_steps", "0"]
        words += ["--data.shards", f"{data}/train-*.tar", "--data.val_shards", f"{data}/test-*.tar"]
        run = train_with([*words, "--run_dir", str(tmp_path / "runs" / name)], tmp_path / "runs" / name)
        assert run.code == 0, run.output
        assert f"eval/val/{metric}" in run.evaluations[-1]
        assert run.output.index("this run") > run.output.index(f"final {metric}")
        picture = Image.open(run.folder / "pictures" / "step_00000002_val.png")
        assert picture.width > 4 * 128 and picture.height > sheet * 128
        assert (run.folder / "export" / "task.safetensors").is_file()
