"""Videos through the production loop: layouts, views, broken files, the command and its export."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch import nn

import megavit
from megavit.cli import parse_run
from megavit.data.config import DataConfig
from megavit.data.write_demo_videos import DIRECTIONS, LENGTH, moving, moving_digits_set, places
from megavit.launch.shards import main as shards
from megavit.model.config import ModelConfig
from megavit.model.video import AttentiveProbe, TemporalTransformer
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import TaskConfig, VideoConfig
from megavit.tasks.exported import load_dense, load_video
from megavit.tasks.task import DeviceBatch
from megavit.train.config import RunConfig
from tests.exports import write_export
from tests.launch.commands import train_with
from tests.ranks import run_ranks
from tests.train.runs import ds_config, log_of, small_run, steps_of, train_here

pytest.importorskip("av", reason="videos need PyAV: pip install 'megavit[video]'")
from megavit.tasks.video import VideoModule, VideoTask

ROOT = Path(__file__).parents[2]
SIDE, TRAINED, TESTED = 16, 40, 13
MODEL = ModelConfig(
    image_size=SIDE, patch_size=4, channels=1, num_classes=0, dim=32, depth=2, num_heads=4, mlp_dim=64
)
HEADS = {
    "attentive": VideoConfig(classes=4, frames=3, views="2x3", label_smoothing=0.1),
    "temporal": VideoConfig(classes=4, frames=3, views="2x3", head="temporal", head_layers=1, layers="0"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the moving digits in folders, as Kinetics comes, and shards of them."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in zip(moving_digits_set().splits, (TRAINED, TESTED), strict=True):
        name = "val" if split.name == "test" else split.name
        for number in range(count):
            path = folder / "videos" / name / list(DIRECTIONS)[number % 4] / f"{number:05}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(split.load(number)["mp4"])
    assert shards(["kinetics", "--root", str(folder / "videos"), "--out", str(folder)]) == 0
    return folder


def video_run(data: Path, folder: Path, task: TaskConfig, **changes: Any) -> RunConfig:
    """20 steps of a head on a small frozen trunk, with mirrored and moved clips."""
    flat = {"freeze": "trunk", "max_steps": 20, "eval_every": 10, "data__workers": 0}
    flat |= {"data__shards": f"{data}/train-000000.tar", "data__val_shards": f"{data}/val-000000.tar"}
    flat |= {"data__augment": "inception", "data__flip": True, "data__rotate_degrees": 5.0}
    return dataclasses.replace(small_run(data, folder, **flat | changes), model=MODEL, task=task)


# A batch of 16 may hold a class four times, a quarter. The first gradient of its bias is then zero but for
# rounding, of which Adam makes a step of visible size, another in every layout. 18 has no quarter.
BATCH = 18
LAYOUTS = [
    (1, 1, 3, 18),
    (2, 1, 2, 3),
    (2, 2, 0, 18),
    (4, 2, 3, 9),
]  # ranks, tp_size, ZeRO stage, micro-batch


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_that_of_one_process_in_every_layout(data: Path, tmp_path: Path, name: str) -> None:
    """Catches heads whose gradients are not summed or summed twice over TP, clips whose frames are mixed with
    those of others, and evaluations that count the empty slots of an uneven last batch."""
    steps, layouts = (20, LAYOUTS) if name == "attentive" else (8, [LAYOUTS[0], LAYOUTS[-1]])
    found, results = [], []
    for number, (ranks, tp, stage, micro_batch) in enumerate(layouts):
        folder = tmp_path / str(number)
        changes = {"tensor_parallel_size": tp, "max_steps": steps, "eval_every": steps // 2}
        run = video_run(data, folder, HEADS[name], **changes)
        raw = ds_config(stage, batch=BATCH, micro_batch=micro_batch)
        assert run_ranks(ranks, train_here, run, raw) == [""] * ranks
        found.append([row[part] for part in ("loss", "grad_norm") for row in steps_of(folder)])
        rows = [row for row in log_of(folder) if row.get("eval") == "val"]
        assert [row["eval/val/samples"] for row in rows] == [TESTED] * 2
        results.append([row[f"eval/val/{part}"] for part in ("loss", "top1") for row in rows])
    assert len(found[0]) == 2 * steps and np.ptp(found[0][:steps]) > 0.005
    for numbers, others in zip(found[1:], results[1:], strict=True):
        assert numbers == pytest.approx(found[0], rel=1e-4)
        assert others == pytest.approx(results[0], rel=1e-4)


def drawn(module: nn.Module) -> None:
    """Fill a module's weights, of which the classifier's start at zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)


@torch.no_grad()
def test_views_of_a_video_are_averaged_as_probabilities() -> None:
    """Catches logits that are averaged, views of different videos that are, samples of weight 0 that count,
    and a top 5 of other classes than the five most probable ones."""
    config = VideoConfig(classes=9, frames=2, views="2x3")
    task = VideoTask(config, MODEL, DataConfig())
    mesh = Mesh.single()
    module = task.build(Initializer(0, mesh), "none").eval()
    assert isinstance(module, VideoModule)
    drawn(module)
    videos = torch.randint(0, 256, (7, 6, 2, SIDE, SIDE, 1), dtype=torch.uint8)
    labels = torch.tensor([[2], [0], [5], [1], [8], [3], [-1]], dtype=torch.int32)
    samples = DeviceBatch({"video": videos, "label": labels}, (labels[:, 0] >= 0).float())

    shares = np.zeros((7, 9))
    for video, view in itertools.product(range(7), range(6)):
        images = videos[video, view].permute(0, 3, 1, 2).float() / 127.5 - 1
        tokens = module.trunk.forward_features(images)[None]
        scores = np.exp(module.decoder(tokens)[0].double().numpy())
        shares[video] += scores / scores.sum() / 6
    picked = shares[np.arange(6), labels[:6, 0]]
    ranks = (shares[:6] > picked[:, None]).sum(1)
    expected = {"top1": (ranks < 1).sum(), "top5": (ranks < 5).sum()}
    assert 0 < expected["top5"] < 6
    sums = module(task.inputs(samples, mesh, training=False))
    assert {name: float(value) for name, value in sums.metrics.items()} == expected
    assert float(sums.loss) == pytest.approx(-np.log(picked).sum(), rel=1e-5)

    parts = [slice(0, 4), slice(4, 7)]
    halves = [
        DeviceBatch({k: v[part] for k, v in samples.fields.items()}, samples.weights[part]) for part in parts
    ]
    added = [module(task.inputs(half, mesh, training=False)) for half in halves]
    assert sum(float(half.metrics["top5"]) for half in added) == expected["top5"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [AttentiveProbe, TemporalTransformer])
def test_a_head_knows_the_order_of_frames_by_its_embedding(kind: type) -> None:
    """Catches an embedding that is added to patches in place of frames, or after frames were joined."""
    config = dataclasses.replace(MODEL, num_classes=5, depth=1)
    tokens = torch.randn(2, 3, 7, 48, generator=torch.Generator().manual_seed(1))
    for timed in (False, True):
        head = kind(48, 3, config, Initializer(0, Mesh.single()), time_embedding=timed)
        drawn(head)
        logits, reversed_logits = head(tokens), head(tokens.flip(1))
        assert logits.shape == (2, 5)
        assert torch.allclose(logits, reversed_logits, atol=1e-4) != timed
        patches_moved = head(tokens.roll(1, 2))
        torch.testing.assert_close(patches_moved, logits, atol=1e-4, rtol=1e-4)


def test_no_frame_of_a_moving_digit_tells_its_direction() -> None:
    """Catches a small real thing that can be learned without time: over all videos of a direction the middle
    frames are those of any other direction, and so are all frames; and backwards a video is one of the
    opposite direction."""
    draws = list(itertools.product(itertools.product(range(2, 7), repeat=2), (-1, 1)))
    ways = {direction: [places(direction, *draw) for draw in draws] for direction in DIRECTIONS}
    for numbers in ([LENGTH // 2], range(LENGTH)):
        found = [Counter(way[number] for way in ways[name] for number in numbers) for name in DIRECTIONS]
        assert all(one == found[0] for one in found)
    assert places("left", (3, 5), 1)[::-1] == places("right", (3, 5), 1)
    frames = moving(np.full((8, 8), 255, np.uint8), places("down", (4, 4), 1))
    assert [int(frame.any(1).argmax()) for frame in frames[2:]] == [2, 4, 6, 8, 10]
    assert [int(frame.any(0).argmax()) for frame in frames[2:]] == [6, 4, 6, 0, 10]
    assert frames.shape == (LENGTH, SIDE, SIDE) and len({frame.tobytes() for frame in frames}) == LENGTH


@pytest.mark.dist
@pytest.mark.slow
def test_the_command_trains_evaluates_and_exports(data: Path, tmp_path: Path) -> None:
    """Catches a recipe that cannot be followed, broken videos that stop a run or are learned from, an export
    that predicts something else than the run's evaluation, and pictures that are not shown."""
    video = next((data / "videos" / "train" / "left").glob("*.mp4")).read_bytes()
    with wds.TarWriter(str(tmp_path / "bad.tar"), encoder=False, mtime=0) as tar:
        tar.write({"__key__": "cut", "mp4": video[:-300], "cls": b"1"})
        tar.write({"__key__": "unknown", "mp4": video, "cls": b"4"})
        tar.write({"__key__": "silent", "txt": b"no video", "cls": b"1"})
    trunk = write_export(tmp_path / "trunk", channels=1)
    folder = tmp_path / "run"
    words = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3_kinetics400.json")]
    words += ["--config", str(ROOT / "launch" / "recipes" / "kinetics400_frozen.yaml"), "--task", "video"]
    words += ["--trunk", str(trunk), "--model.image_size", "16", "--run_dir", str(folder)]
    shards = f"{{{data / 'train-000000'},{tmp_path / 'bad'}}}.tar"
    words += ["--data.shards", shards, "--data.max_bad_fraction", "0.9"]
    words += ["--data.val_shards", f"{data}/val-000000.tar", "--data.class_names", f"{data}/classes.txt"]
    words += ["--task.classes", "4", "--task.frames", "3", "--task.stride", "1", "--task.interval_s", "0.1"]
    words += [
        "--task.head_width",
        "8",
        "--task.head_layers",
        "1",
        "--data.workers",
        "0",
        "--task.views",
        "2x1",
    ]
    words += ["--ds.train_batch_size", "16", "--max_steps", "4", "--schedule.warmup_steps", "1"]
    found = train_with(words, folder)
    assert found.code == 0, found.output
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {row["key"]: row["reason"] for row in bad}
    assert reasons.keys() == {"cut", "unknown", "silent"}
    assert "cannot be decoded" in reasons["cut"] and "no mp4" in reasons["silent"]
    assert (folder / "export" / "classes.txt").read_text().split() == list(DIRECTIONS)

    with pytest.raises(ValueError, match="task video, which is no dense task"):
        load_dense(folder)
    with pytest.raises(ValueError, match="a model of --task video, not a classifier of photos"):
        megavit.load(folder)
    task, module = load_video(folder)
    losses, right = [], []
    for number in range(TESTED):
        label = number % 4
        file = data / "videos" / "val" / list(DIRECTIONS)[label] / f"{number:05}.mp4"
        with torch.no_grad():
            shares = module.probabilities(task.read(file.read_bytes()))[0]
        losses.append(-float(shares[label].log()))
        right.append(int(shares.argmax()) == label)
    row = found.evaluations[-1]
    assert np.mean(losses) == pytest.approx(row["eval/val/loss"], rel=1e-4)
    assert np.mean(right) == pytest.approx(row["eval/val/top1"])
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert b"pictures/val" in events and b"pictures/train" in events


START = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--model.name", "vit_tiny", "--task", "video"]
START += ["--data.shards", "x.tar", "--max_steps", "3"]
MISTAKES = {
    (): "task.classes",
    ("--task.classes", "4", "--task.views", "4"): "times 1 or 3 crops",
    ("--task.classes", "4", "--task.views", "2x2"): "times 1 or 3 crops",
    ("--task.classes", "4", "--task.frames", "0"): "task.frames",
    ("--task.classes", "4", "--task.interval_s", "0"): "task.interval_s",
    ("--task.classes", "4", "--task.layers", "1,2"): "reads 1 of the blocks",
    ("--task.classes", "4", "--data.mixup", "0.2"): "cannot blend",
    ("--task.classes", "4", "--model.channels", "2"): "1 or 3 channels",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches configurations that fail only when the engine is built."""
    with pytest.raises(SystemExit):
        parse_run([*START, *words])
    assert MISTAKES[words] in capsys.readouterr().err
