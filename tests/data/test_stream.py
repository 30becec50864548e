"""The order as a source of webdataset's own pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from megavit.data.lanes import Lanes, Order
from megavit.data.stream import LaneSource
from tests.data.shards import picture, write_shards


def add_number(sample: dict[str, object]) -> dict[str, object]:
    return sample | {"number": int(sample["cls"])}


@pytest.mark.parametrize("workers", [0, 2])
def test_user_stages_compose(tmp_path: Path, workers: int) -> None:
    """Catches samples that webdataset's stages do not understand, or another order than the trainer's."""
    manifest = write_shards(tmp_path)
    order = Order(Lanes(manifest.samples, 24, seed=5), 24)
    found: list[tuple[str, int]] = []
    for rank in (0, 1):
        source = LaneSource(manifest, order, 3, 5, batch=4, dp_rank=rank, dp_size=2)
        stages = (
            wds.map(add_number),
            wds.to_tuple("__key__", "number", "png"),
            wds.batched(4, partial=False),
        )
        context = "forkserver" if workers else None
        pipeline = wds.DataPipeline(source, *stages)
        for keys, numbers, images in DataLoader(
            pipeline, batch_size=None, num_workers=workers, multiprocessing_context=context
        ):
            found += zip(keys, [int(number) for number in numbers], strict=True)
            assert list(images) == [picture(int(key)) for key in keys]
    expected = []
    for rank in (0, 1):
        for step in (3, 4):
            slots = order.slots(step, rank * 12, 12)
            places = zip(slots.shard.tolist(), slots.index.tolist(), strict=True)
            expected += [manifest.index(shard).key(index) for shard, index in places]
    assert found == [(key, int(key) % 10) for key in expected]
    with pytest.raises(ValueError, match="batches of 5"):
        LaneSource(manifest, order, 0, 1, batch=5)
