"""Every kind of plane that cannot be used, through the production loop."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from tests.ranks import run_ranks
from tests.tasks.dense_data import SIDE, png, scene, write_dense
from tests.tasks.test_dense import HEADS, dense_run
from tests.train.runs import ds_config, log_of, train_here


class Harm:
    """What a pickle does that is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels of 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def huge_npy(side: int) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({side}, {side}), }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"


EMPTY = "no pixel of which anything is known"
Kinds = dict[str, tuple[dict[str, bytes], str]]  # members that make a sample a bad one, what is said of it


def bad_masks() -> Kinds:
    _, _, mask = scene(np.random.default_rng(3))
    files = {
        "no image": (b"no image", "mask.png cannot be decoded"),
        "truncated": (png(mask)[:-25], "mask.png cannot be decoded"),
        "size": (png(mask[:8]), "16x8 pixels, but its picture 16x16"),
        "empty": (png(np.full_like(mask, 255)), EMPTY),
        "class": (png(np.full_like(mask, 7)), "class 7, which is outside 0..2"),
        "one column": (png(np.where(np.arange(SIDE) == 3, np.uint8(3), mask)), "class 3"),
        "16 bits": (png(np.full_like(mask, 300, np.uint16)), "class 300"),
        "colours": (png(np.stack([mask] * 3, 2)), "3 channels, not 1"),
        "huge": (huge_png(60_000), "too many pixels"),
    }
    missing: Kinds = {"missing": ({}, "has png but no mask.png")}
    return missing | {kind: ({"mask.png": data}, words) for kind, (data, words) in files.items()}


def bad_depth() -> Kinds:
    _, metres, _ = scene(np.random.default_rng(3))
    depth = (metres * 1000).astype(np.uint16)
    grey, objects = depth.astype(np.uint8), np.full((SIDE, SIDE), Harm(), object)
    floats = {
        "not a number": (metres * np.nan, EMPTY),
        "infinite": (metres + np.inf, EMPTY),
        "negative": (-metres - 1, EMPTY),
        "too large": (metres.astype(np.float64) + 1e300, "no float32"),
        "complex": (metres + 1j, "holds complex64, not numbers"),
        "words": (np.full((SIDE, SIDE), "far"), "holds <U3, not numbers"),
        "objects": (objects, "holds object, not numbers"),
        "flat": (metres.ravel(), "has shape [256]"),
        "other size": (metres[:, :8], "8x16 pixels, but its picture 16x16"),
    }
    palette = io.BytesIO()
    Image.fromarray(grey).convert("P").save(palette, "PNG")
    return {
        "missing": ({}, "has png but no depth.png or depth.npy"),
        "no image": ({"depth.png": b""}, "depth.png cannot be decoded"),
        "truncated": ({"depth.png": png(depth)[:-30]}, "depth.png cannot be decoded"),
        "size": ({"depth.png": png(depth[:8])}, "16x8 pixels, but its picture 16x16"),
        "empty": ({"depth.png": png(depth * 0)}, EMPTY),
        "8 bits": ({"depth.png": png(grey)}, "has 8 bits a channel, not 16"),
        "palette": ({"depth.png": palette.getvalue()}, "has 8 bits a channel, not 16"),
        "colours": ({"depth.png": png(np.stack([grey] * 3, 2))}, "3 channels, not 1"),
        "huge": ({"depth.png": huge_png(60_000)}, "too many pixels"),
        "huge npy": ({"depth.npy": huge_npy(100_000)}, "100000x100000 pixels"),
        "pickle": ({"depth.npy": pickle.dumps(Harm())}, "header cannot be read"),
        "short": ({"depth.npy": npy(metres)[:-4]}, "has 1020 bytes of values"),
    } | {kind: ({"depth.npy": npy(values)}, words) for kind, (values, words) in floats.items()}


@pytest.mark.dist
@pytest.mark.parametrize(("name", "kinds"), [("dpt", bad_depth), ("linear", bad_masks)])
def test_bad_planes_are_bad_samples_with_a_reason(
    tmp_path: Path, name: str, kinds: Callable[[], Kinds]
) -> None:
    """Catches planes that stop a run, that are learned from or measured silently, or that are unpickled; and
    evaluations in which they count."""
    bad, folder = kinds(), tmp_path / "run"
    data = write_dense(tmp_path / "data", train=48 - len(bad))  # an epoch of one batch
    picture, _, _ = scene(np.random.default_rng(3))
    for copy in ("bad-train", "bad-val"):
        with wds.TarWriter(str(data / f"{copy}.tar"), encoder=False, mtime=0) as tar:
            for kind, (members, _) in bad.items():
                tar.write({"__key__": kind.replace(" ", "_"), "png": png(picture), **members})
    changes = {"data__shards": f"{data}/{{train-0,bad-train}}.tar", "data__max_bad_fraction": 0.5}
    changes |= {"data__val": (f"both={data}/{{test-0,bad-val}}.tar",), "max_steps": 2, "eval_every": 2}
    assert run_ranks(1, train_here, dense_run(data, folder, HEADS[name], **changes), ds_config(2)) == [""]
    rows = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    for copy in ("bad-train", "bad-val"):
        reasons = {row["key"]: row["reason"] for row in rows if copy in row["url"]}
        assert reasons.keys() == {kind.replace(" ", "_") for kind in bad}, copy
        for kind, (_, words) in bad.items():
            assert words in reasons[kind.replace(" ", "_")], (copy, kind, reasons)
    clean, both = ([row for row in log_of(folder) if row.get("eval") == one][-1] for one in ("val", "both"))
    for key, value in clean.items():
        if key.startswith("eval/val/") and not key.endswith("/bad"):
            assert both[key.replace("/val/", "/both/")] == pytest.approx(value, rel=1e-6), key
    assert clean["eval/val/samples"] == 21 and both["eval/both/bad"] == len(bad)
