"""The shard tools as a user calls them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import shards
from megavit.data.class_names import class_names_beside
from tests.data.shards import flip_bit, truncate, write_shards
from tests.data.test_write import cifar_fixture

SHARDS = str(Path(__file__).parents[2] / "launch" / "shards.py")


@pytest.mark.slow
def test_index_verify_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a damaged shard, sample or header that verify does not name, and one that it names for
    nothing."""

    def call(*words: str) -> tuple[int, str]:
        code = shards.main(words)
        said = capsys.readouterr()
        return code, said.out + said.err

    made = write_shards(tmp_path, indexed=False)
    words = [f"{tmp_path}/x-{{000..005}}.tar", "--out", str(tmp_path / "index")]
    done = subprocess.run([sys.executable, SHARDS, "index", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "6 shards, 240 samples" in done.stdout, done
    manifest = str(tmp_path / "index" / "x.manifest.json")
    code, text = call("verify", manifest)
    assert code == 0 and "no problems" in text
    code, text = call("stats", manifest)
    assert code == 0 and "width           min 8, median 8, max 8" in text and "PNG: 240" in text
    assert "classes         10, ids 0 to 9" in text

    (tmp_path / "x-000.tar").unlink()
    truncate(tmp_path / "x-001.tar", 30_000)
    flip_bit(tmp_path / "x-002.tar", made.index(2).sample(3)["png"].offset + 40)
    flip_bit(tmp_path / "x-003.tar", 20)  # the first header's name
    code, text = call("verify", manifest)
    assert code == 1
    assert "x-000.tar: missing (40 samples)" in text
    assert "x-001.tar: has 30000 bytes" in text and "sample '000079'" in text and "cut off" in text
    assert "sample '000083'" in text and "x-003.tar is damaged" in text
    assert "x-004.tar" not in text and "x-005.tar" not in text
    code, text = call("stats", manifest, "--shards", "3", "--workers", "1")
    assert code == 0 and "unusable        41" in text  # shard 0, and one sample of shard 2


def test_decoding_finds_what_the_checksums_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a photo that was damaged before it came into the shard, and is found by training only."""
    for name in ("good", "damaged"):
        (tmp_path / "in" / "cat").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / "cat" / f"{name}.jpg")
    damaged = tmp_path / "in" / "cat" / "damaged.jpg"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    (tmp_path / "in" / "cat" / "moving.gif").write_bytes(b"GIF89a")
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert shards.main(["imagefolder", "--root", str(tmp_path / "in"), *out]) == 0
    said = capsys.readouterr().out
    assert "note: train: left out 1 .gif (cat/moving.gif); samples are made of jpg, jpeg, png, webp" in said
    manifest = [str(tmp_path / "out" / "train.manifest.json"), "--workers", "1"]
    assert shards.main(["verify", *manifest]) == 0 and shards.main(["stats", *manifest]) == 0
    assert "unusable        0" in capsys.readouterr().out
    assert shards.main(["verify", *manifest, "--decode"]) == 1
    (problem, _) = capsys.readouterr().out.splitlines()
    assert "it cannot be decoded: JPEG" in problem and "(made from 'cat/damaged.jpg')" in problem
    assert shards.main(["stats", *manifest, "--decode"]) == 0
    said = capsys.readouterr().out
    assert "unusable        1" in said and "cat/damaged.jpg" in said


@pytest.mark.parametrize("classes", [10, 100])
def test_the_names_of_the_classes_lie_beside_the_shards(tmp_path: Path, classes: int) -> None:
    """Catches a data set whose model has a number of classes that somebody must know by heart."""
    cifar_fixture(tmp_path, classes)
    words = [f"cifar{classes}", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert shards.main(words) == 0
    assert class_names_beside(f"{tmp_path}/out/train-*.tar") == [f"class {i}" for i in range(classes)]
