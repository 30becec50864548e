"""Videos of real handwritten digits (scikit-learn's) that move left, right, up or down: what heads for videos
find out that no single frame tells.

A frame that is drawn from a video at random shows the digit in the same places whatever the direction is, so
one frame is at chance (a quarter). Frames without their order tell the axis, but not the direction (a half).

`python -m tests.tasks.moving_digits TRUNK [PICTURE.png]` trains four heads on that export, frozen, prints
their results on digits that none has seen, a row of a Markdown table each, and draws some clips.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from launch.shards import main as shards
from megavit.tasks.exported import load_video
from megavit.train.logging.pictures import draw_pictures
from tests.launch.commands import train_with

_NUM_TRAINED = 1437  # of 1797 digits: the demo's split
_SIDE, _LENGTH, _FRAMES, _SPEED = 16, 6, 4, 2  # pixels, frames of a video and of a clip, pixels a frame
DIRECTIONS = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}
HEADS = {
    "attentive, one frame": ["--task.head", "attentive", "--task.frames", "1"],
    "attentive, without order": ["--task.head", "attentive", "--task.time_embedding", "false"],
    "attentive": ["--task.head", "attentive"],
    "temporal": ["--task.head", "temporal", "--task.head_layers", "2"],
}


def places(direction: str, middle: tuple[int, int], time: int) -> list[tuple[int, int]]:
    """Row and column of a digit in each frame. It passes the `middle` of its way, and beside its way it stays
    where another one is at a `time`, so that frames do not tell the axis either."""
    way = [_SPEED * number - _SPEED * (_LENGTH - 1) // 2 for number in range(_LENGTH)]
    rows, columns = DIRECTIONS[direction]
    return [
        (
            middle[0] + (rows * along if rows else way[time]),
            middle[1] + (columns * along if columns else way[time]),
        )
        for along in way
    ]


def moving(ink: np.ndarray, where: Sequence[tuple[int, int]]) -> np.ndarray:
    """Frames uint8 [T, 16, 16] of a digit `ink` [8, 8] in several places, perhaps partly outside."""
    border = len(ink)
    frames = np.zeros((len(where), _SIDE + 2 * border, _SIDE + 2 * border), np.uint8)
    for frame, (row, column) in zip(frames, where, strict=True):
        frame[border + row :, border + column :][: len(ink), : len(ink)] = ink * 255 / 16
    return frames[:, border:-border, border:-border]


def write_mp4(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))


def write_videos(folder: Path, train: int = _NUM_TRAINED, test: int = 360) -> Path:
    """Shards `train-*.tar` and `val-*.tar` of the digits of the demo's split, written as Kinetics is: from
    videos in folders of classes, in `folder/videos`."""
    digits, random = load_digits().images, np.random.default_rng(0)
    for split, first, count in (("train", 0, train), ("val", _NUM_TRAINED, test)):
        for number, ink in enumerate(digits[first : first + count]):
            direction = list(DIRECTIONS)[number % len(DIRECTIONS)]
            path = folder / "videos" / split / direction / f"{number:05}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            row, column = random.integers(2, 7, 2).tolist()
            way = places(direction, (row, column), int(random.integers(_LENGTH)))
            write_mp4(path, moving(ink, way))
    assert shards(["kinetics", "--root", str(folder / "videos"), "--out", str(folder)]) == 0
    return folder


def train_head(folder: Path, data: Path, trunk: str, *flags: str) -> dict[str, Any]:
    """The last evaluation of a head on the frozen `trunk`, an export; its run is `folder/run`."""
    words = ["--deepspeed_config", "ds_configs/zero2.json", "--ds.train_batch_size", "32"]
    words += ["--ds.optimizer.params.lr", "3e-3"]
    words += ["--task", "video", "--task.frames", str(_FRAMES), "--freeze", "trunk", "--trunk", trunk]
    words += ["--model.image_size", str(_SIDE), "--run_dir", str(folder / "run")]
    words += ["--data.shards", f"{data}/train-*.tar", "--data.val_shards", f"{data}/val-*.tar"]
    words += ["--data.augment", "none", "--data.flip", "false", "--data.eval_crop", "1.0"]
    words += ["--max_steps", "200", "--schedule.warmup_steps", "25", "--data.workers", "1"]
    folder.mkdir(parents=True)
    found = train_with([*words, *flags], folder / "run")
    assert found.code == 0, found.output
    return found.evaluations[-1]


def draw_clips(run_dir: Path, data: Path, path: Path, count: int = 8) -> None:
    """A PNG of unseen clips, a row each: the frames, the truth and the prediction."""
    task, module = load_video(run_dir)
    names, shown, captions = list(DIRECTIONS), [], []
    for number in range(count):
        truth = names[number % len(names)]
        file = data / "videos" / "val" / truth / f"{number:05}.mp4"
        views = task.read(file.read_bytes())
        with torch.no_grad():
            share, found = module.probabilities(views).max(1)
        shown.append(views[0, 0].permute(0, 3, 1, 2).float() / 255)
        captions += [f"truth: {truth}", f"found: {names[int(found)]} {float(share):.0%}"]
        captions += [""] * (len(shown[-1]) - 2)
    Image.fromarray(draw_pictures(torch.cat(shown), captions)).save(path)


def results(trunk: str, folder: Path, *flags: str, picture: Path | None = None) -> dict[str, dict[str, Any]]:
    """The last evaluation of each of `HEADS` on the videos of digits that were not trained on. `flags` are
    more of the trainer's; `picture` takes clips and what the last head finds in them."""
    data = write_videos(folder / "data")
    found = {}
    for name, own in HEADS.items():
        found[name] = train_head(folder / name, data, trunk, *own, *flags)
    if picture:
        draw_clips(folder / name / "run", data, picture)
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[str]:
    """`results` as a Markdown table."""
    lines = ["| head on four frames | top-1 | loss |", "|---|---|---|"]
    for name, row in found.items():
        lines.append(f"| {name} | {row['eval/val/top1']:.3f} | {row['eval/val/loss']:.3f} |")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        png = Path(sys.argv[2]) if len(sys.argv) > 2 else None
        print("\n".join(rows(results(sys.argv[1], Path(place), picture=png))))
