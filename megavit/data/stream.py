"""The order as a webdataset source: `wds.DataPipeline(LaneSource(...), wds.map(...), ...)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from megavit.data.cache import ShardCache
from megavit.data.lanes import Order
from megavit.data.manifest import Manifest
from megavit.data.reader import ShardReader


class LaneSource(IterableDataset[dict[str, Any]]):
    """This DP rank's samples of steps [first_step, last_step), undecoded, as webdataset's own readers yield
    them: `__key__`, `__url__` and the members' bytes by extension.

    In a DataLoader with workers, whole batches of `batch` samples go round the workers, so that with
    `wds.batched(batch)` in the pipeline and `batch_size=None` they come out in order. Raises SampleError for
    a damaged sample. ValueError if `batch` does not divide the rank's share of the global batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        first_step: int,
        last_step: int,
        *,
        batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cache: ShardCache | None = None,
    ):
        share = order.global_batch // dp_size
        if order.global_batch % dp_size or share % batch:
            raise ValueError(
                f"batches of {batch} do not fill rank {dp_rank}'s share of the global batch "
                f"{order.global_batch} over {dp_size} ranks"
            )
        self._reader, self._order = ShardReader(manifest, cache), order
        self._steps = range(first_step, last_step)
        self._batch, self._share, self._first = batch, share, dp_rank * share

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        per_step = self._share // self._batch
        for number in range(worker, len(self._steps) * per_step, workers):
            step, part = divmod(number, per_step)
            first = self._first + part * self._batch
            slots = self._order.slots(self._steps[step], first, self._batch)
            for shard, index in zip(slots.shard.tolist(), slots.index.tolist(), strict=True):
                members = self._reader.members(shard, index)
                found = self._reader.read(shard, index, members.values())
                yield {
                    "__key__": self._reader.key(shard, index),
                    "__url__": self._reader.manifest.urls[shard],
                    **dict(zip(members, found, strict=True)),
                }
