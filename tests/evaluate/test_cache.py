"""The feature cache: computed once, whatever happens; the same rows at any number of ranks."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import megavit
from megavit.evaluate.cache import Pass, PassSettings
from megavit.evaluate.sets.image_set import Adjust, Files, ImageSet, one_label
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from tests.evaluate.models import random_set, rows_of, run_pass, small_model
from tests.exports import NAMES, write_export
from tests.ranks import run_ranks

LAYERS = ("pooled", "patches", "block.0")


class Counting:
    """A model that counts the images that it sees, and fails before more than `limit`."""

    def __init__(self, model: Any, limit: float = float("inf"), most: float = float("inf")):
        self._model, self._limit, self._most = model, limit, most
        self.seen = self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def features(self, pixels: Tensor, layers: Any) -> Any:
        self._calls += 1
        if len(pixels) > self._most and self._calls > 1:  # the first is the blank image
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(pixels) > 1:  # the blank image from which the widths are known
            self.seen += len(pixels)
        if self.seen > self._limit:
            raise KeyboardInterrupt
        return self._model.features(pixels, layers)


def test_features_are_those_of_the_model(tmp_path: Path) -> None:
    """Catches rows in another order, another transform than in use, and a layer that is another's."""
    images = random_set()
    model = small_model(tmp_path / "model")
    found = run_pass(model, images, tmp_path / "cache", *LAYERS, batch_size=23)
    predictor = megavit.load(tmp_path / "model")
    pixels = [images.images.read(number) for number in range(len(images))]
    logits = torch.cat([model.logits(piece.values) for piece in found["pooled"].mine()])
    torch.testing.assert_close(logits, predictor(pixels).logits, rtol=1e-5, atol=1e-5)
    whole = MegaVit.from_pretrained(tmp_path / "model")
    rows = torch.stack(list(predictor.prepare(pixels)))  # type: ignore[misc]
    prepared = rows.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        tokens, blocks = whole.forward_intermediates(prepared, [0], norm=True, output_fmt="NLC")
    torch.testing.assert_close(rows_of(found["patches"]), tokens.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows_of(found["block.0"]), blocks[0].mean(1), rtol=1e-5, atol=1e-5)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    """Catches a second forward pass for a second protocol, also of one more layer for some pieces only."""
    model, images = Counting(small_model(tmp_path / "model")), random_set()
    first = run_pass(model, images, tmp_path / "cache", "pooled")
    assert model.seen == 150
    again = run_pass(model, images, tmp_path / "cache", "pooled")
    assert model.seen == 150
    assert torch.equal(rows_of(first["pooled"]), rows_of(again["pooled"]))
    run_pass(model, images, tmp_path / "cache", *LAYERS)
    assert model.seen == 300


def test_a_pass_that_was_ended_goes_on(tmp_path: Path) -> None:
    """Catches a pass that starts over, or takes a piece that was not finished for whole."""
    real, images = small_model(tmp_path / "model"), random_set()
    model = Counting(real, limit=100)
    with pytest.raises(KeyboardInterrupt):
        run_pass(model, images, tmp_path / "cache", *LAYERS, batch_size=10)
    rest = Counting(real)
    found = run_pass(rest, images, tmp_path / "cache", *LAYERS, batch_size=10)
    assert rest.seen == 150 - 64  # one piece of 64 rows was whole
    whole = run_pass(real, images, tmp_path / "other", *LAYERS, batch_size=10)
    for layer in LAYERS:
        assert torch.equal(rows_of(found[layer]), rows_of(whole[layer]))


def test_a_damaged_piece_is_made_again(tmp_path: Path) -> None:
    """Catches a file that a crash of the host has cut off, read as features."""
    real, images = small_model(tmp_path / "model"), random_set()
    whole = rows_of(run_pass(real, images, tmp_path / "cache")["pooled"])
    for number, damage in enumerate(
        (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99)
    ):
        piece = sorted((tmp_path / "cache").glob("*/pooled/*.safetensors"))[number]
        piece.write_bytes(damage(piece.read_bytes()))
    model = Counting(real)
    assert torch.equal(rows_of(run_pass(model, images, tmp_path / "cache")["pooled"]), whole)
    assert model.seen == 150


def test_changes_never_meet_old_features(tmp_path: Path) -> None:
    """Catches features of other weights, another transform, other images or another precision."""
    images = random_set()
    real = small_model(tmp_path / "model")

    def seen(model: Any, images: ImageSet, **settings: Any) -> int:
        counting = Counting(model)
        run_pass(counting, images, tmp_path / "cache", **settings)
        return counting.seen

    assert seen(real, images) == 150
    assert seen(real, images) == 0
    assert seen(small_model(write_export(tmp_path / "crop", crop=0.5)), images) == 150
    other = write_export(tmp_path / "weights")
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert seen(small_model(other), images) == 150
    assert seen(real, random_set(seed=1)) == 150
    assert seen(real, images.first(100)) == 100
    assert seen(real, images, dtype="float16") == 150
    assert seen(real, images.adjusted(Adjust(border=2))) == 150
    assert seen(real, dataclasses.replace(images, labels=1 - images.labels)) == 0  # features know no labels


def test_bad_images_are_named_and_left_out(tmp_path: Path) -> None:
    """Catches an unreadable image that ends the pass, is counted, or is forgotten by a second run."""
    import cv2

    folder = tmp_path / "photos"
    folder.mkdir()
    names = tuple(f"{number}.png" for number in range(70))
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((20, 20, 3), number, np.uint8))
    (folder / "3.png").write_bytes(b"no image")
    (folder / "68.png").write_bytes((folder / "68.png").read_bytes()[:40])
    files = Files(str(folder), names)
    images = ImageSet("photos", "test", files, one_label([0] * 70), NAMES, "photos", files.digest())
    (folder / "7.png").unlink()
    for _ in range(2):
        one = Pass(small_model(tmp_path / "model"), images, PassSettings(tmp_path / "cache"))
        features = one.features(["pooled"])["pooled"]
        assert [bad.row for bad in one.bad] == [3, 7, 68]
        assert all(
            name in bad.reason for name, bad in zip(("3.png", "7.png", "68.png"), one.bad, strict=True)
        )
        assert len(rows_of(features)) == 67
        assert features.usable.tolist() == [row for row in range(70) if row not in (3, 7, 68)]


def test_without_memory_batches_are_halved(tmp_path: Path) -> None:
    """Catches a pass that ends for want of GPU memory, or that loses the images of the batch."""
    real, images = small_model(tmp_path / "model"), random_set()
    said: list[str] = []
    one = Pass(Counting(real, most=20), images, PassSettings(tmp_path / "cache"), said.append)  # type: ignore[arg-type]
    found = one.features(["pooled"])["pooled"]
    torch.testing.assert_close(rows_of(found), rows_of(run_pass(real, images, tmp_path / "b")["pooled"]))
    assert [line for line in said if "no memory" in line] == [
        "no memory for so many images at a time: going on with 32",
        "no memory for so many images at a time: going on with 16",
    ]
    with pytest.raises(ValueError, match="no memory for 1 images"):
        run_pass(Counting(real, most=0.5), images.first(4), tmp_path / "c")


def test_float16_is_half_the_size_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    """Catches infinite features in the cache, and a size that was not announced."""
    real, images = small_model(tmp_path / "model"), random_set()
    said: list[str] = []
    one = Pass(real, images, PassSettings(tmp_path / "cache", "float16"), said.append)
    half = rows_of(one.features(["pooled"])["pooled"])
    torch.testing.assert_close(
        half, rows_of(run_pass(real, images, tmp_path / "b")["pooled"]), rtol=1e-3, atol=1e-3
    )
    assert "4.8 kB" in said[0]  # 150 x 16 x 2

    class Large(Counting):
        def features(self, pixels: Tensor, layers: Any) -> Any:
            return {layer: torch.full((len(pixels), 4), 1e6) for layer in layers}

    with pytest.raises(ValueError, match="--cache_dtype float32"):
        run_pass(Large(real), images, tmp_path / "c", dtype="float16")

    class Broken(Counting):
        def features(self, pixels: Tensor, layers: Any) -> Any:
            return {layer: torch.full((len(pixels), 4), torch.nan) for layer in layers}

    with pytest.raises(ValueError, match="weights of model are damaged"):
        run_pass(Broken(real), images, tmp_path / "d")


def test_a_full_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a pass that fills the disk for hours and then ends."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**4, 0, 9000))
    model = Counting(small_model(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"need 9.6 kB, but .* has 9 kB left; name another folder with --cache_dir"
    ):
        run_pass(model, random_set(), tmp_path / "cache")
    assert model.seen == 0


def ranks_features(
    folder: Path, cache: Path, tp_size: int
) -> tuple[dict[str, Tensor], int, list[int], list[int]]:
    mesh = Mesh.from_environment(tp_size)
    found = run_pass(small_model(folder, mesh), random_set(203), cache, *LAYERS, batch_size=16)
    mine = [row for piece in found["pooled"].mine() for row in piece.rows.tolist()]
    taken = found["pooled"].take(np.array([202, 0, 77]))
    rows = {layer: rows_of(features) for layer, features in found.items()}
    assert torch.equal(taken, rows["pooled"][[202, 0, 77]])
    return rows, mesh.dp_rank, mine, found["pooled"].usable.tolist()


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
def test_all_layouts_have_the_same_features(ranks: int, tp_size: int, tmp_path: Path) -> None:
    """Catches rows that are lost or counted twice over ranks, and a sharded model that differs."""
    write_export(tmp_path / "model")
    expected = run_pass(small_model(tmp_path / "model"), random_set(203), tmp_path / "single", *LAYERS)
    results = run_ranks(ranks, ranks_features, tmp_path / "model", tmp_path / "cache", tp_size)
    seen: dict[int, list[int]] = {}
    for rows, dp_rank, mine, usable in results:
        assert seen.setdefault(dp_rank, mine) == mine  # the ranks of a TP group have the same
        assert usable == list(range(203))
        for layer in LAYERS:
            torch.testing.assert_close(rows[layer], rows_of(expected[layer]), rtol=1e-5, atol=1e-5)
    assert sorted(row for mine in seen.values() for row in mine) == list(range(203))
