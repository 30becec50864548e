"""Looking over a data set: every byte against its checksums, counts and sizes, and what a step will read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from megavit.data.bad import SampleError
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.exif import orientation, upright_size
from megavit.data.identity import difference, rows_of_run
from megavit.data.images import open_image
from megavit.data.index import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, ShardError, walk_tar
from megavit.data.json_data import json_field, parse_json
from megavit.data.labels import read_labels
from megavit.data.lanes import DataState, Lanes, Order, ranges_from_json
from megavit.data.manifest import DATA_FILE, Manifest, in_processes, open_shards
from megavit.data.reader import ShardReader
from megavit.data.sources import SourceError


def verify(manifest: Manifest, cache: ShardCache, workers: int, *, decode: bool = False) -> Iterator[str]:
    """Re-read every byte; yields a line for each missing or damaged shard and each damaged sample.

    Compares sizes, indexes, every checksum, and the tar headers that plain webdataset would follow; with
    `decode` also has every sample decoded by the code that training reads with.
    """
    check = partial(_verify_shard, manifest, cache, decode)
    for lines in in_processes(check, range(len(manifest)), workers, "verify"):
        yield from lines


class _Trial:
    """Decodes samples as training does, with any class number and without augmentation."""

    def __init__(self, manifest: Manifest, cache: ShardCache):
        import torch  # takes seconds, which only decoding is worth

        from megavit.data.fields import Labels, Picture
        from megavit.data.samples import Samples

        torch.set_num_threads(1)  # there is a process for each core
        fields = [Picture(size=224), Labels(num_classes=2**31 - 1)]  # labels are int32
        self._samples = Samples(manifest, fields, DataConfig(), cache)
        self._row = [column[0, ...] for column in self._samples.empty(1)]

    def decode(self, shard: int, index: int) -> None:
        """SampleError if training could not use the sample."""
        self._samples.load(shard, index, self._row, None)


def _verify_shard(manifest: Manifest, cache: ShardCache, decode: bool, shard: int) -> list[str]:
    url, size = manifest.urls[shard], int(manifest.shard_bytes[shard])
    lost = f"{int(manifest.samples[shard])} samples"
    reader = ShardReader(manifest, cache)
    try:
        file = reader.file(shard)
        index = manifest.index(shard)
    except FileNotFoundError:
        return [f"{url}: missing ({lost})"]
    except OSError as error:
        return [f"{url}: {error.strerror} ({lost})"]
    except (SourceError, ShardError) as error:
        return [f"{url}: {error} ({lost})"]
    found = []
    if index.digest != manifest.digests[shard]:
        found.append(f"{url}: its index is not the one in the manifest; make both again")
    on_disk = os.fstat(file).st_size
    if on_disk != size:
        found.append(f"{url}: has {on_disk} bytes, the manifest says {size}")
    trial = _Trial(manifest, cache) if decode else None
    for number in range(len(index)):
        try:
            reader.read(shard, number, index.sample(number).values())
            if trial:
                trial.decode(shard, number)
        except SampleError as error:
            found.append(str(error))
    try:
        known = set(zip(index.members["offset"].tolist(), index.members["size"].tolist(), strict=True))
        if not known <= {(offset, length) for _, offset, length in walk_tar(file, url)}:
            found.append(f"{url}: its headers do not lead to the members in the index")
    except ShardError as error:
        found.append(str(error))
    reader.close()
    return found


@dataclass
class Statistics:
    """Counts over some or all shards; sizes in pixels, bytes as stored."""

    samples: int = 0
    image_bytes: int = 0
    label_count: Counter[int] = field(default_factory=Counter)  # labels of an image -> images
    classes: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self, manifest: Manifest) -> list[str]:
        """The numbers as text, a line each."""

        def spread(values: list[int]) -> str:
            return "min {:.0f}, median {:.0f}, max {:.0f}".format(*np.quantile(values or [0], (0, 0.5, 1)))

        common, rare = self.classes.most_common(5), self.classes.most_common()[:-6:-1]
        lines = [
            f"shards          {len(manifest):,} ({manifest.shard_bytes.sum():,} bytes)",
            f"samples         {manifest.num_samples:,} ({self.samples:,} looked at)",
            f"image bytes     {self.image_bytes:,} "
            f"({self.image_bytes / (len(self.widths) or 1):,.0f} a sample)",
            f"formats         {_counts(self.formats.most_common())}",
            f"width           {spread(self.widths)}",
            f"height          {spread(self.heights)}",
            f"labels an image {_counts(sorted(self.label_count.items()))}",
            f"classes         {len(self.classes):,}, ids {min(self.classes, default=0)} to "
            f"{max(self.classes, default=0)}",
            f"  most frequent {_counts(common)}",
            f"  rarest        {_counts(rare)}",
            f"unusable        {len(self.problems):,}",
        ]
        return lines + [f"  {problem}" for problem in self.problems[:20]]

    def add(self, other: Statistics) -> None:
        """Take in another part's counts."""
        self.samples += other.samples
        self.image_bytes += other.image_bytes
        for name in ("label_count", "classes", "formats"):
            getattr(self, name).update(getattr(other, name))
        for name in ("widths", "heights", "problems"):
            getattr(self, name).extend(getattr(other, name))


def _counts(rows: Iterable[tuple[object, int]]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in rows)


def statistics(
    manifest: Manifest, cache: ShardCache, workers: int, shards: int = 0, *, decode: bool = False
) -> Statistics:
    """Image sizes (from the headers), formats, labels and bytes of `shards` shards, spread evenly; 0 takes
    all. With `decode`, a sample that training could not decode counts as unusable."""
    count = min(shards or len(manifest), len(manifest))
    chosen = np.unique(np.linspace(0, len(manifest) - 1, count).round().astype(int)).tolist()
    total = Statistics()
    look = partial(_shard_statistics, manifest, cache, decode)
    for part in in_processes(look, chosen, workers, "stats"):
        total.add(part)
    return total


def _shard_statistics(manifest: Manifest, cache: ShardCache, decode: bool, shard: int) -> Statistics:
    reader, found = ShardReader(manifest, cache), Statistics()
    trial = _Trial(manifest, cache) if decode else None
    for number in range(int(manifest.samples[shard])):
        found.samples += 1
        try:
            members = reader.members(shard, number)
            image = next(members[name] for name in IMAGE_EXTENSIONS if name in members)
            label = next(members[name] for name in LABEL_EXTENSIONS if name in members)
            image_bytes, label_bytes = reader.read(shard, number, (image, label))
            opened = open_image(image_bytes, DataConfig.max_pixels)
            labels = read_labels(label.extension, label_bytes)
            if trial:
                trial.decode(shard, number)
        except SampleError as error:
            found.problems.append(str(error))
        except StopIteration:
            found.problems.append(str(reader.error(shard, number, "no image or no label")))
        except ValueError as error:
            found.problems.append(str(reader.error(shard, number, str(error))))
        else:
            found.image_bytes += len(image_bytes)
            width, height = upright_size(*opened.size, orientation(image_bytes))
            found.widths.append(width)
            found.heights.append(height)
            found.formats[opened.format or "?"] += 1
            found.label_count[len(labels)] += 1
            found.classes.update(labels)
    reader.close()
    return found


def samples_of_step(manifest: Manifest, order: Order, step: int) -> Iterator[dict[str, object]]:
    """Slot, url, key, epoch and lane of every sample of a step, from the indexes alone."""
    reader = ShardReader(manifest)
    slots = order.slots(step, 0, order.global_batch)
    for slot, (shard, index) in enumerate(zip(slots.shard.tolist(), slots.index.tolist(), strict=True)):
        yield {
            "slot": slot,
            "url": manifest.urls[shard],
            "key": reader.key(shard, index),
            "epoch": slots.epoch,
            "lane": slot // order.per_lane,
        }


def order_of_run(run_dir: Path) -> tuple[Manifest, Order]:
    """The training shards and the order of a run folder. ValueError if it is none, or its shards have
    changed."""
    path = run_dir / DATA_FILE
    try:
        saved = parse_json(path.read_bytes())
        shards, global_batch = json_field(saved, "shards", str), json_field(saved, "global_batch", int)
        state = DataState.from_json(json_field(saved, "state", dict))
        skips = ranges_from_json(json_field(saved, "skips", list))
    except OSError as error:
        raise ValueError(f"{run_dir} is no run folder with data: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} does not tell the order of a run: {error}") from error
    manifest = open_shards(shards, allow_pipe=True)  # from the indexes alone: nothing is fetched
    if not manifest.is_same(state.manifest, state.checksums):
        before = rows_of_run(path)
        what = difference(manifest.rows(), before) if before else ""
        raise ValueError(f"the shards {shards} have changed since the run of {run_dir}: {what or 'digest'}")
    lanes = Lanes(manifest.samples, state.num_lanes, state.seed, state.block)
    return manifest, Order(lanes, global_batch, skips, state)
