"""Shards of small pictures with planes that can be told from them: a bright disc on a dark ground is near and
of class 1."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

SIDE = 16


def scene(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey picture uint8 [S, S], depth in metres float32 [S, S], 0 where there is none, and classes uint8
    [S, S], 255 where there is none."""
    y, x = np.mgrid[:SIDE, :SIDE]
    row, column = random.integers(3, SIDE - 3, 2)
    disc = (y - row) ** 2 + (x - column) ** 2 < random.integers(6, 30)
    picture = np.where(disc, 200, 50) + random.integers(-20, 20, (SIDE, SIDE))
    depth = np.where(disc, 2.0, 5.0) + 0.05 * y
    classes = np.where(disc, 1, np.where(x < SIDE // 2, 0, 2))
    hidden = random.random((SIDE, SIDE)) < 0.2
    return (
        picture.astype(np.uint8),
        np.where(hidden, 0, depth).astype(np.float32),
        np.where(hidden, 255, classes).astype(np.uint8),
    )


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write_dense(folder: Path, train: int = 200, test: int = 21) -> Path:
    """`train-0.tar` and `test-0.tar` with depth in millimetres and masks, and what `dense.json` says."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        with wds.TarWriter(str(folder / f"{split}-0.tar"), encoder=False, mtime=0) as tar:
            for number in range(count):
                picture, depth, classes = scene(random)
                members = {"png": png(picture), "mask.png": png(classes)}
                members["depth.png"] = png((depth * 1000).round().astype(np.uint16))
                tar.write({"__key__": f"{number:03}", **members})
    facts = {"depth": {"scale": 0.001, "invalid": 0, "max_m": 10}, "mask": {"invalid": 255, "classes": 3}}
    (folder / "dense.json").write_text(json.dumps(facts))
    return folder
