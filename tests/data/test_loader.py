"""Batches: the same at any number of ranks and workers, and errors that name the sample."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from PIL import Image

from megavit.config import DataConfig, ModelConfig, run_preset
from megavit.data.index import index_shards
from megavit.data.loader import EvalLoader, SampleError, TrainLoader

RUN = run_preset("vit_tiny")


def train_loader(
    folder: Path, dp_rank: int = 0, dp_size: int = 1, workers: int = 0, micro: int = 8
) -> TrainLoader:
    data = DataConfig(**{**RUN.data.__dict__, "workers": workers})
    shards = index_shards(f"{folder}/train-*.tar")
    sizes = {"global_batch": 48, "micro_batch": micro}
    return TrainLoader(shards, RUN.model, data, seed=5, dp_rank=dp_rank, dp_size=dp_size, **sizes)


def global_batches(folder: Path, first: int, last: int, dp_size: int, **options: Any) -> torch.Tensor:
    """Images of steps [first, last) in slot order, put together from all ranks: [steps, 48, S, S, C]."""
    per_rank = []
    for dp_rank in range(dp_size):
        batches = list(train_loader(folder, dp_rank, dp_size, **options).batches(first, last))
        per_rank.append(torch.cat([images for images, _ in batches]).unflatten(0, (last - first, -1)))
    return torch.cat(per_rank, dim=1)


@pytest.mark.parametrize(("dp_size", "micro"), [(2, 8), (3, 16), (6, 4), (1, 48)])
def test_global_batch_does_not_depend_on_ranks_or_accumulation(
    digits: Path, dp_size: int, micro: int
) -> None:
    """Catches an order or augmentation tied to the rank."""
    expected = global_batches(digits, 27, 33, 1)  # across an epoch's end (29 steps)
    assert torch.equal(global_batches(digits, 27, 33, dp_size, micro=micro), expected)


def test_workers_change_nothing(digits: Path) -> None:
    """Catches batches that overtake each other, or randomness from the worker."""
    assert torch.equal(global_batches(digits, 0, 4, 1, workers=2), global_batches(digits, 0, 4, 1))


def test_start_at_any_step(digits: Path) -> None:
    """Catches state that only earlier batches would have set."""
    assert torch.equal(global_batches(digits, 0, 40, 1)[35:], global_batches(digits, 35, 40, 1))


def test_augmentation_differs_between_epochs(digits: Path) -> None:
    """Catches augmentation keyed without the epoch: the same sample would look the same for ever."""
    loader = train_loader(digits, micro=48)
    steps = loader.lanes.steps_per_epoch
    seen: dict[tuple[int, int], torch.Tensor] = {}
    compared = equal = 0
    for step in [*range(3), *range(steps, 2 * steps)]:
        slots = loader.lanes.slots(step, 0, 48)
        (images, _) = next(loader.batches(step, step + 1))
        for place, image in zip(
            zip(slots.shard.tolist(), slots.index.tolist(), strict=True), images, strict=True
        ):
            if place in seen:
                compared, equal = compared + 1, equal + int(torch.equal(seen[place], image))
            seen[place] = image
    assert compared > 100 and equal < compared / 20


@pytest.mark.parametrize(("dp_size", "batch"), [(1, 64), (2, 64), (4, 32), (7, 13)])
def test_evaluation_sees_every_sample_exactly_once(digits: Path, dp_size: int, batch: int) -> None:
    """Catches samples dropped or counted twice, and ranks with fewer batches, which would hang the others."""
    shards = index_shards(f"{digits}/test-*.tar")
    whole = EvalLoader(shards, RUN.model, RUN.data, batch=360, dp_rank=0, dp_size=1)
    ((images, labels),) = list(whole)
    found: list[tuple[bytes, int]] = []
    for dp_rank in range(dp_size):
        batches = list(EvalLoader(shards, RUN.model, RUN.data, batch=batch, dp_rank=dp_rank, dp_size=dp_size))
        assert len(batches) == -(-360 // (batch * dp_size))
        for some, some_labels in batches:
            found += [(i.numpy().tobytes(), int(n)) for i, n in zip(some, some_labels, strict=True) if n >= 0]
    expected = [(i.numpy().tobytes(), int(n)) for i, n in zip(images, labels, strict=True)]
    assert sorted(found) == sorted(expected)


def shard_with(path: Path, label: bytes, image: bytes | None = None) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, "PNG")
    with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
        tar.write({"__key__": "good", "png": buffer.getvalue(), "cls": b"1"})
        tar.write({"__key__": "odd", "png": buffer.getvalue() if image is None else image, "cls": label})


@pytest.mark.parametrize(
    ("label", "image", "words"),
    [
        (b"10", None, ["'odd'", "label 10", "0..9", "--model.num_classes"]),
        (b"-1", None, ["'odd'", "-1"]),
        (b"cat", None, ["'odd'", "'cat' is not a class number"]),
        (b"", None, ["'odd'", "not a class number"]),
        (b"1", b"no image at all", ["'odd'", "cannot be decoded"]),
        (b"1", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ["'odd'", "cannot be decoded"]),
    ],
)
def test_unusable_samples_are_named(tmp_path: Path, label: bytes, image: bytes, words: list[str]) -> None:
    """Catches training on garbage, and an error that does not say where it is."""
    assert_named(tmp_path, label, image, words, workers=0)


def test_unusable_samples_are_named_by_workers(tmp_path: Path) -> None:
    """Catches an error that loses its type or text on the way from the worker process."""
    assert_named(tmp_path, b"99", None, ["'odd'", "label 99"], workers=1)


def assert_named(tmp_path: Path, label: bytes, image: bytes | None, words: list[str], workers: int) -> None:
    shard_with(tmp_path / "x.tar", label, image)
    config = ModelConfig(
        image_size=8, patch_size=2, channels=1, num_classes=10, dim=8, num_heads=2, mlp_dim=8
    )
    data = DataConfig(workers=workers)
    loader = EvalLoader(index_shards(str(tmp_path / "x.tar")), config, data, batch=2, dp_rank=0, dp_size=1)
    with pytest.raises(SampleError) as error:
        list(loader)
    assert all(word in str(error.value) for word in [*words, "x.tar"]), error.value
