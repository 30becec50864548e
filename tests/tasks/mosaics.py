"""Mosaics of real handwritten digits (scikit-learn's) with masks: what a linear head reads from a trunk that
was trained to name single digits.

`python -m tests.tasks.mosaics TRUNK` trains the head on that export, frozen, and on a trunk of random
weights, and prints the results on mosaics of digits that neither has seen.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import webdataset as wds
from sklearn.datasets import load_digits

from tests.launch.commands import train_with
from tests.tasks.dense_data import png
from tests.train.runs import log_of

_NUM_TRAINED = 1437  # of 1797 digits: the demo's split
_BACKGROUND = 10
_INK = 6  # of 16: a pixel of the digit


def write_mosaics(folder: Path, train: int = 1500, test: int = 200) -> Path:
    """`train-0.tar` and `test-0.tar`: 16 x 16 pixels, four digits each; masks have the digit of every pixel
    of ink, and 10 elsewhere."""
    found = load_digits()
    parts = {"train": (train, 0, _NUM_TRAINED), "test": (test, _NUM_TRAINED, len(found.images))}
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, (count, first, last) in parts.items():
        with wds.TarWriter(str(folder / f"{split}-0.tar"), encoder=False, mtime=0) as tar:
            for number in range(count):
                four = random.integers(first, last, 4)
                ink = found.images[four]
                classes = np.where(ink >= _INK, found.target[four, None, None], _BACKGROUND)
                members = {"png": png(_joined(ink * 255 / 16)), "mask.png": png(_joined(classes))}
                tar.write({"__key__": f"{number:05}", **members})
    names = [*map(str, range(10)), "background"]
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "dense.json").write_text(json.dumps({"mask": {"invalid": 255, "classes": len(names)}}))
    return folder


def _joined(four: np.ndarray) -> np.ndarray:
    """uint8 [16, 16] of four quadrants [4, 8, 8]."""
    return np.block([[four[0], four[1]], [four[2], four[3]]]).astype(np.uint8)


def train_head(folder: Path, data: Path, trunk: str, *flags: str) -> dict[str, float]:
    """The evaluation of a linear head on the frozen `trunk`, an export, or if empty one of random weights."""
    words = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--ds.train_batch_size", "64"]
    words += ["--task", "segment", "--freeze", "trunk", "--run_dir", str(folder / "run")]
    words += ["--trunk", trunk] if trunk else ["--model.name", "vit_tiny"]
    words += ["--model.image_size", "16", "--data.workers", "0"]
    words += ["--data.shards", f"{data}/train-0.tar", "--data.val_shards", f"{data}/test-0.tar"]
    words += ["--data.augment", "none", "--data.flip", "false", "--data.eval_crop", "1.0"]
    words += ["--max_steps", "250", "--schedule.warmup_steps", "25", "--log_every", "50", *flags]
    found = train_with(words, folder / "command")
    assert found.code == 0, found.output
    (row,) = [row for row in log_of(folder / "run") if row.get("eval") == "val"]
    return {name.rpartition("/")[2]: value for name, value in row.items() if isinstance(value, float)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        mosaics = write_mosaics(Path(name) / "mosaics")
        for kind, trunk in {"trained": sys.argv[1], "random": ""}.items():
            results = train_head(Path(name) / kind, mosaics, trunk, *sys.argv[2:])
            print(kind, {key: round(value, 4) for key, value in results.items()}, flush=True)
