"""Mosaics of real handwritten digits (scikit-learn's) with masks: what a linear head reads from a trunk that
was trained to name digits, in sliding windows.

`python -m tests.tasks.mosaics TRUNK` trains the head on single digits with masks, on that export, frozen, and
on a trunk of random weights, and prints the results on mosaics of digits that neither has seen.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from sklearn.datasets import load_digits

from megavit.tasks.exported import load_dense
from megavit.tasks.metrics import confusion, segmentation_results
from megavit.tasks.windows import sliding_window
from tests.launch.commands import train_with
from tests.tasks.dense_data import png

_NUM_TRAINED = 1437  # of 1797 digits: the demo's split
_BACKGROUND = 10
_INK = 6  # of 16: a pixel of the digit


def _masks(ink: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The digit of every pixel of ink, and 10 elsewhere: [..., 8, 8] of digits `classes` [...]."""
    return np.where(ink >= _INK, classes[..., None, None], _BACKGROUND)


def write_digits(folder: Path) -> Path:
    """`train-0.tar` and `test-0.tar`: the digits of the demo's split, with masks."""
    found = load_digits()
    folder.mkdir(parents=True)
    for split, part in (("train", slice(0, _NUM_TRAINED)), ("test", slice(_NUM_TRAINED, None))):
        ink = found.images[part]
        with wds.TarWriter(str(folder / f"{split}-0.tar"), encoder=False, mtime=0) as tar:
            for number, (picture, mask) in enumerate(zip(ink, _masks(ink, found.target[part]), strict=True)):
                members = {"png": png((picture * 255 / 16).astype(np.uint8))}
                members["mask.png"] = png(mask.astype(np.uint8))
                tar.write({"__key__": f"{number:05}", **members})
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in [*range(10), "background"]))
    return folder


def unseen_mosaics(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Model inputs [n, 1, 16, 16] of four unseen digits each, and their classes [n, 16, 16]."""
    found = load_digits()
    four = np.random.default_rng(1).integers(_NUM_TRAINED, len(found.images), (count, 4))
    ink = found.images[four]

    def joined(parts: np.ndarray) -> torch.Tensor:
        rows = [np.concatenate([parts[:, at], parts[:, at + 1]], 2) for at in (0, 2)]
        return torch.from_numpy(np.concatenate(rows, 1))

    images = joined((ink * 255 / 16).astype(np.uint8)).float() / 127.5 - 1
    return images[:, None], joined(_masks(ink, found.target[four]))


def train_head(folder: Path, data: Path, trunk: str, *flags: str) -> Path:
    """The run folder of a linear head on the frozen `trunk`, an export, or if empty one of random weights."""
    words = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--ds.train_batch_size", "64"]
    words += ["--task", "segment", "--freeze", "trunk", "--run_dir", str(folder / "run")]
    words += ["--trunk", trunk] if trunk else ["--model.name", "vit_tiny"]
    words += ["--data.shards", f"{data}/train-0.tar", "--data.val_shards", f"{data}/test-0.tar"]
    words += ["--data.augment", "none", "--data.flip", "false", "--data.eval_crop", "1.0"]
    words += ["--data.workers", "0", "--max_steps", "300", "--schedule.warmup_steps", "25"]
    folder.mkdir()
    found = train_with([*words, "--log_every", "50", *flags], folder / "command")
    assert found.code == 0, found.output
    return folder / "run"


@torch.no_grad()
def on_mosaics(run_dir: Path) -> dict[str, float]:
    """The results of a run on unseen mosaics, in windows of the trunk's size."""
    task, module = load_dense(run_dir)
    images, truth = unseen_mosaics()
    size, weights = task.model.image_size, torch.ones(len(images))
    maps = sliding_window(lambda windows: module.maps(windows, weights), images, size, size)
    return segmentation_results(confusion(maps.argmax(1), truth, _BACKGROUND + 1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        digits = write_digits(Path(name) / "digits")
        for kind, trunk in {"trained": sys.argv[1], "random": ""}.items():
            results = on_mosaics(train_head(Path(name) / kind, digits, trunk, *sys.argv[2:]))
            print(kind, {key: round(value, 4) for key, value in results.items()}, flush=True)
    _, masks = unseen_mosaics()
    background = segmentation_results(confusion(torch.full_like(masks, _BACKGROUND), masks, _BACKGROUND + 1))
    print("background everywhere", {key: round(value, 4) for key, value in background.items()})
