"""Batches: the same at any number of ranks and workers; bad samples keep their slot, with weight 0."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import io
import os
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.fields import Batch
from megavit.data.lanes import DataState
from megavit.data.loader import EvalLoader, Share, TrainLoader
from megavit.data.manifest import index_pattern, open_shards
from megavit.data.worker import WorkerError
from megavit.model.config import ModelConfig
from megavit.recipe import RECIPES, read_recipe
from tests.data.shards import flip_bit, labelled, picture, reading_hangs, truncate, write_shards

RUN = read_recipe(RECIPES / "digits.yaml")
FIELDS = labelled(RUN.model, RUN.data)
WHOLE = Share()


def train_loader(
    shards: str, share: Share = WHOLE, micro: int = 8, batch: int = 48, state: Any = None, **data: Any
) -> TrainLoader:
    config = dataclasses.replace(RUN.data, shards=shards, **data)
    sizes = {"global_batch": batch, "micro_batch": micro, "share": share, "state": state}
    return TrainLoader(open_shards(shards), labelled(RUN.model, config), config, seed=5, **sizes)


def global_batches(
    shards: str, first: int, last: int, dp_size: int, tp_size: int = 1, **options: Any
) -> torch.Tensor:
    """Images of steps [first, last) in slot order, put together from all ranks: [steps, batch, S, S, C]."""
    per_rank = []
    for dp_rank in range(dp_size):
        parts = [
            list(
                train_loader(shards, Share(dp_rank, dp_size, tp_rank, tp_size), **options).batches(
                    first, last
                )
            )
            for tp_rank in range(tp_size)
        ]
        whole = [
            torch.cat([batch.fields["image"] for batch in same])[: len(same[0].flips)]
            for same in zip(*parts, strict=True)
        ]
        per_rank.append(torch.cat(whole).unflatten(0, (last - first, -1)))
    return torch.cat(per_rank, dim=1)


@pytest.fixture(scope="module")
def train(digits: Path) -> str:
    return f"{digits}/train.manifest.json"


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "micro"), [(2, 1, 8), (3, 1, 16), (6, 1, 4), (1, 4, 48), (2, 3, 8), (3, 4, 2)]
)
def test_global_batch_does_not_depend_on_ranks_or_accumulation(
    train: str, dp_size: int, tp_size: int, micro: int
) -> None:
    """Catches an order or augmentation tied to the rank, and parts of a TP group that do not add up."""
    expected = global_batches(train, 27, 33, 1)  # across an epoch's end (29 steps)
    assert torch.equal(global_batches(train, 27, 33, dp_size, tp_size, micro=micro), expected)


def test_workers_change_nothing(train: str) -> None:
    """Catches batches that overtake each other, or randomness from the worker."""
    assert torch.equal(global_batches(train, 0, 4, 1, workers=2), global_batches(train, 0, 4, 1))


def test_the_number_of_workers_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches more processes than cores, which torch warns of in three lines, and none at all."""
    for cores, bound_to, ranks, expected in (
        (2, 2, 1, 2),
        (2, 2, 2, 1),
        (2, 2, 4, 1),
        (128, 128, 8, 4),
        (16, 2, 8, 2),  # a launcher has bound each rank to two of sixteen
        (16, 3, 1, 3),  # a container
    ):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, some=bound_to: set(range(some)))
        assert Share(local_size=ranks).workers(None) == expected
    assert Share(local_size=8).workers(0) == 0 and Share(local_size=8).workers(20) == 20


def test_start_at_any_step(train: str) -> None:
    """Catches state that only earlier batches would have set."""
    assert torch.equal(global_batches(train, 0, 40, 1)[35:], global_batches(train, 35, 40, 1))


def test_a_resumed_run_goes_on_with_other_ranks_and_another_batch(train: str) -> None:
    """Catches a state that holds the layout, or that is not complete."""
    state = DataState.from_json(train_loader(train, lanes=24).state_at(31))
    expected = global_batches(train, 31, 35, 1, lanes=24)
    for dp_size, workers in ((2, 0), (3, 1)):
        assert torch.equal(
            global_batches(train, 31, 35, dp_size, state=state, workers=workers, lanes=24), expected
        )
    larger = global_batches(train, 31, 33, 2, state=state, lanes=24, batch=96)
    # Lane by lane, two turns of the larger batch are four of the smaller.
    assert torch.equal(
        larger.unflatten(1, (24, 4)).transpose(0, 1).flatten(1, 2),
        expected.unflatten(1, (24, 2)).transpose(0, 1).flatten(1, 2),
    )


def test_changed_shards_are_refused_on_resuming(tmp_path: Path) -> None:
    """Catches a continuation over other data that nobody notices."""
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", shards=7)
    loader = train_loader(str(tmp_path / "a" / "x.manifest.json"))
    state = DataState.from_json(loader.state_at(3))
    loader.save_order(tmp_path / "data.json", 0)
    changed = str(tmp_path / "b" / "x.manifest.json")
    with pytest.raises(
        ValueError, match=r"changed since step 3: 7 shards with 280.*6 with 240.*allow_changed_man"
    ):
        train_loader(changed, state=state)
    with pytest.raises(ValueError, match=r"x-006\.tar \(40 samples.*is added"):
        TrainLoader(
            open_shards(changed),
            labelled(RUN.model, RUN.data),
            RUN.data,
            seed=5,
            global_batch=48,
            micro_batch=8,
            state=state,
            data_file=tmp_path / "data.json",
        )
    assert train_loader(changed, state=state, allow_changed_manifest=True).passes(3) > 0


def test_augmentation_differs_between_epochs(train: str) -> None:
    """Catches augmentation keyed without the epoch: the same sample would look the same for ever."""
    loader = train_loader(train, micro=48)
    steps = loader.order.lanes.turns(loader.order.per_lane)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    compared = equal = 0
    for step in [*range(3), *range(steps, 2 * steps)]:
        slots = loader.order.slots(step, 0, 48)
        images = next(loader.batches(step, step + 1)).fields["image"]
        for place, image in zip(
            zip(slots.shard.tolist(), slots.index.tolist(), strict=True), images, strict=True
        ):
            if place in seen:
                compared, equal = compared + 1, equal + int(torch.equal(seen[place], image))
            seen[place] = image
    assert compared > 100 and equal < compared / 20


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "batch"), [(1, 1, 64), (2, 1, 64), (4, 2, 32), (7, 1, 13), (2, 4, 13)]
)
def test_evaluation_sees_every_sample_exactly_once(
    digits: Path, dp_size: int, tp_size: int, batch: int
) -> None:
    """Catches samples dropped or counted twice, and ranks with fewer batches, which would hang the others."""
    shards = open_shards(f"{digits}/test-*.tar")
    (whole,) = list(EvalLoader(shards, FIELDS, RUN.data, batch=360))
    found: list[tuple[bytes, int]] = []
    for rank in range(dp_size * tp_size):
        share = Share(rank // tp_size, dp_size, rank % tp_size, tp_size)
        batches = list(EvalLoader(shards, FIELDS, RUN.data, batch=batch, share=share))
        assert len(batches) == -(-360 // (batch * dp_size))
        assert {len(some.fields["image"]) for some in batches} == {-(-batch // tp_size)}
        found += [sample for some in batches for sample in samples(some)]
    assert sorted(found) == sorted(samples(whole)) and len(found) == 360


def samples(batch: Batch) -> list[tuple[bytes, int]]:
    rows = zip(batch.fields["image"], batch.fields["label"], batch.weights, strict=True)
    return [(image.numpy().tobytes(), int(labels[0])) for image, labels, weight in rows if weight]


def odd_shard(folder: Path, image: bytes, **label: bytes) -> str:
    with wds.TarWriter(str(folder / "x.tar"), encoder=False, mtime=0) as tar:
        tar.write({"__key__": "good", "png": picture(0), "cls": b"1"})
        tar.write({"__key__": "odd", "png": image, **label})
    return str(folder / "x.tar")


@pytest.mark.parametrize(
    ("label", "image", "words", "workers"),
    [
        ({"cls": b"10"}, picture(0), "label 10 is outside 0..9", 0),
        ({"cls": b"cat"}, picture(0), "'cat' is not a class number", 0),
        ({"json": b"[1, 2"}, picture(0), "cannot be parsed", 0),
        ({}, picture(0), "it has png but no cls or json", 0),
        ({"cls": b"1"}, b"no image at all", "cannot be decoded", 0),
        ({"cls": b"1"}, picture(1)[:60], "cannot be decoded", 0),
        ({"cls": b"1"}, picture(1)[:60], "cannot be decoded", 1),
        ({"json": b"[" * 200_000}, picture(0), "nested too deeply", 0),
        (
            {"cls": b"1"},
            picture(0, size=(301, 200)),
            "301x200 pixels are more than --data.max_pixels 60000",
            0,
        ),
        ({"cls": b"1"}, picture(0, "GIF"), "not an image of a known format", 0),
    ],
)
def test_unusable_samples_keep_their_slot(
    tmp_path: Path, label: dict[str, bytes], image: bytes, words: str, workers: int
) -> None:
    """Catches training on garbage, another batch shape, and a record that does not say where it was."""
    shards = odd_shard(tmp_path, image, **label)
    loader = train_loader(shards, batch=2, micro=2, workers=workers, max_pixels=60_000)
    (batch,) = list(loader.batches(0, 1))
    assert batch.fields["image"].shape == (2, 8, 8, 1) and sorted(batch.weights.tolist()) == [0.0, 1.0]
    bad = int(batch.weights.argmin())
    assert not batch.fields["image"][bad].any() and (batch.fields["label"][bad] == -1).all()
    (record,) = batch.bad
    assert record.key == "odd" and record.url.endswith("x.tar") and words in record.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_sample_that_takes_all_memory_keeps_its_slot(tmp_path: Path, kind: str) -> None:
    """Catches a run that a single image ends with MemoryError."""
    image = io.BytesIO()
    Image.new("L", (7000, 7000)).save(image, kind)
    loader = train_loader(odd_shard(tmp_path, image.getvalue(), cls=b"1"), batch=2, micro=2)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), before[1]))  # the pixels take 49 MB
    try:
        (batch,) = list(loader.batches(0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert sorted(batch.weights.tolist()) == [0.0, 1.0]
    assert [bad.key for bad in batch.bad] == ["odd"] and "memory" in batch.bad[0].reason.lower()


def test_damaged_shards_cost_their_samples_and_no_others(tmp_path: Path) -> None:
    """Catches a batch that shrinks, a sample that is lost beside the damaged ones, and one that is not
    counted."""
    manifest = write_shards(tmp_path)
    (tmp_path / "x-000.tar").unlink()
    truncate(tmp_path / "x-001.tar", 30_000)
    flip_bit(tmp_path / "x-002.tar", manifest.index(2).sample(7)["png"].offset + 50)
    loader = train_loader(str(tmp_path / "x.manifest.json"), batch=24, micro=24, augment="none")
    lost = {f"{i:06}" for i in range(40)} | {"000087"}
    lost |= {f"{i + 40:06}" for i in range(40) if manifest.index(1).sample(i)["png"].offset > 28_000}
    seen = 0
    for step, batch in enumerate(loader.batches(0, 10)):
        slots = loader.order.slots(step, 0, 24)
        keys = [
            manifest.index(s).key(i) for s, i in zip(slots.shard.tolist(), slots.index.tolist(), strict=True)
        ]
        labels = batch.fields["label"][:, 0].tolist()
        for key, weight, label in zip(keys, batch.weights.tolist(), labels, strict=True):
            assert (weight == 0) == (key in lost) or manifest.index(1).sample(int(key) - 40)[
                "png"
            ].offset > 26_000
            assert label == (int(key) % 10 if weight else -1)
        assert {bad.key for bad in batch.bad} == {
            key for key, weight in zip(keys, batch.weights.tolist(), strict=True) if not weight
        }
        seen += len(batch.bad)
    assert 50 < seen < 80


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_shards_give_the_same_batches(tmp_path: Path, workers: int) -> None:
    """Catches a cache that the loader does not use, evicts what is being read, or loses on the way to a
    worker."""
    local = write_shards(tmp_path / "data", samples=40)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "data"))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/x-{{000..005}}.tar"
        cache = ShardCache(tmp_path / "cache", int(local.shard_bytes.sum()) // 2)  # smaller than the data
        manifest = index_pattern(url, tmp_path / "index", 1, cache)
        assert manifest.digest == local.digest
        sizes = {"global_batch": 48, "micro_batch": 8}
        data = dataclasses.replace(RUN.data, workers=workers, shuffle_block=8)
        remote = TrainLoader(manifest, FIELDS, data, seed=5, cache=cache, **sizes)
        same = TrainLoader(local, FIELDS, dataclasses.replace(data, workers=0), seed=5, **sizes)
        for mine, expected in zip(remote.batches(0, 3), same.batches(0, 3), strict=True):
            assert not mine.bad and torch.equal(mine.fields["image"], expected.fields["image"])
        server.shutdown()


def test_several_labels(tmp_path: Path) -> None:
    """Catches the second label lost, and an empty list that only one loss can use."""
    write_shards(tmp_path, labels="json")
    batch = next(train_loader(f"{tmp_path}/x-*.tar").batches(0, 1))
    pairs = {tuple(row) for row in batch.fields["label"][:, :3].tolist()}
    assert pairs <= {(*sorted((i, (i + 3) % 10)), -1) for i in range(10)} and len(pairs) > 5
    empty = odd_shard(tmp_path, picture(3), json=b'{"labels": []}')
    manifest = open_shards(empty)
    for allow, weights in ((True, [1.0, 1.0]), (False, [1.0, 0.0])):
        (batch,) = list(EvalLoader(manifest, labelled(RUN.model, RUN.data, allow), RUN.data, batch=2))
        assert batch.weights.tolist() == weights


def test_pairs_are_mixed_alike_in_every_layout(train: str) -> None:
    """Catches blends and colours that depend on how the batch is cut, and pairs whose halves differ."""
    changes = {"mixup": 0.8, "cutmix": 1.0, "contrast": 0.5}
    whole = next(train_loader(train, micro=48, **changes).batches(3, 4))
    assert torch.equal(whole.blends[::2], whole.blends[1::2]) and len(whole.blends.unique(dim=0)) > 20
    parts = [
        b for rank in (0, 1) for b in train_loader(train, Share(rank, 2), micro=8, **changes).batches(3, 4)
    ]
    assert torch.equal(torch.cat([part.blends for part in parts]), whole.blends)
    assert torch.equal(torch.cat([part.flips for part in parts]), whole.flips)
    assert torch.equal(torch.cat([part.colors for part in parts]), whole.colors)
    assert torch.equal(torch.cat([part.numbers for part in parts]), whole.numbers)
    assert len(whole.colors.unique(dim=0)) == len(whole.numbers.unique()) == 48
    with pytest.raises(ValueError, match="micro-batch must be even, got 3"):
        train_loader(train, micro=3, mixup=0.8)


@pytest.mark.dist
def test_a_killed_worker_is_an_error_that_names_its_sample(train: str) -> None:
    """Catches a run that waits for ever for a process that the kernel killed."""
    loader = train_loader(train, workers=1)
    batches = loader.batches(0, 10_000)
    next(batches)
    worker = int(loader.reading().split()[2])  # data worker PID last read ...
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"worker {worker} was reading sample \d+ of .*train-\d+\.tar"):
        for _ in range(1000):
            next(batches)


@pytest.mark.dist
def test_a_worker_that_hangs_is_an_error_that_names_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that waits for ever for a file system that does not answer."""
    write_shards(tmp_path, shards=1, samples=60)
    loader = train_loader(str(tmp_path / "x.manifest.json"), workers=1, timeout_s=60.0)
    # However long the worker takes to start: the time is over as soon as it reads.
    clock = SimpleNamespace(monotonic=lambda: np.inf if loader.reading() else 0.0)
    monkeypatch.setattr("megavit.data.worker.time", clock)
    monkeypatch.setattr("megavit.data.loader.CHECK_S", 0.5)
    with reading_hangs([tmp_path / "x-000.tar"]):
        batches = loader.batches(0, 1)
        with pytest.raises(WorkerError, match=r"no batch in time.*was reading sample \d+ of .*x-000\.tar"):
            next(batches)


@pytest.mark.slow
def test_long_runs_do_not_grow(tmp_path: Path) -> None:
    """Catches caches, handles and records that pile up with every batch."""
    write_shards(tmp_path, shards=40, samples=20)
    loader = train_loader(str(tmp_path / "x.manifest.json"))
    batches = loader.batches(0, 10_000)
    sizes = []
    for _ in range(4):
        for _ in range(300):
            next(batches)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert sizes[-1] - sizes[0] < 8e6, np.diff(sizes)


def test_config_is_what_the_loader_needs() -> None:
    """Catches options that reach the loader although they make no sense."""
    for wrong, words in (
        ({"skip_steps": "5:5"}, "A < B"),
        ({"skip_steps": "1:9,5:12"}, "overlap"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction"),
        ({"tp": "both"}, "one of split, replicate"),
        ({"lanes": -1}, "lanes"),
        ({"max_pixels": 0}, "max_pixels must lie in 1 to 178956970"),
        ({"max_pixels": 10**9}, "max_pixels must lie in 1 to 178956970"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig(**wrong)
    assert DataConfig(skip_steps="7:9, 1:3").skips == ((1, 3), (7, 9))
    assert ModelConfig().num_classes == 1000
