"""Looking over a data set: every byte against its checksums, counts and sizes, and what a step will read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megavit.data.audit_planes import PlaneCounts, name_of_plane, plane_members
from megavit.data.bad import SampleError
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.exif import orientation, upright_size
from megavit.data.identity import difference, rows_of_run
from megavit.data.images import open_image
from megavit.data.index import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Member,
    ShardError,
    walk_tar,
)
from megavit.data.json_data import json_field, parse_json
from megavit.data.labels import read_labels
from megavit.data.lanes import DataState, Lanes, Order, ranges_from_json
from megavit.data.manifest import DATA_FILE, Manifest, in_processes, open_shards
from megavit.data.plane_facts import PlaneFacts
from megavit.data.reader import ShardReader
from megavit.data.sources import SourceError

if TYPE_CHECKING:
    from megavit.data.trial import Trial


def verify(
    manifest: Manifest,
    cache: ShardCache,
    workers: int,
    *,
    decode: bool = False,
    planes: Mapping[str, PlaneFacts] | None = None,
) -> Iterator[str]:
    """Re-read every byte; yields a line for each missing or damaged shard and each damaged sample.

    Compares sizes, indexes, every checksum, and the tar headers that plain webdataset would follow; with
    `decode` also has every sample decoded by the code that training reads with, its planes being what
    `planes` says.
    """
    check = partial(_verify_shard, manifest, cache, decode, planes or {})
    for lines in in_processes(check, range(len(manifest)), workers, "verify"):
        yield from lines


def _trial(
    manifest: Manifest, cache: ShardCache, decode: bool, planes: Mapping[str, PlaneFacts]
) -> Trial | None:
    if not decode:
        return None
    from megavit.data.trial import Trial  # takes seconds, which only decoding is worth

    return Trial(manifest, cache, planes)


def _verify_shard(
    manifest: Manifest, cache: ShardCache, decode: bool, planes: Mapping[str, PlaneFacts], shard: int
) -> list[str]:
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
    trial = _trial(manifest, cache, decode, planes)
    for number in range(len(index)):
        try:
            members = index.sample(number)
            reader.read(shard, number, members.values())
            if trial:
                trial.decode(shard, number, members)
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
    image_bytes: int = 0  # or of videos
    label_count: Counter[int] = field(default_factory=Counter)  # labels of an image -> images
    classes: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)  # planes by extension -> samples
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # of videos
    problems: list[str] = field(default_factory=list)
    planes: dict[str, PlaneCounts] = field(default_factory=dict)  # what was decoded, by extension

    def lines(self, manifest: Manifest, planes: Mapping[str, PlaneFacts] | None = None) -> list[str]:
        """The numbers as text, a line each; `planes` says what those of planes mean."""

        def spread(values: list[int]) -> str:
            return "min {:.0f}, median {:.0f}, max {:.0f}".format(*np.quantile(values or [0], (0, 0.5, 1)))

        lines = [
            f"shards          {len(manifest):,} ({manifest.shard_bytes.sum():,} bytes)",
            f"samples         {manifest.num_samples:,} ({self.samples:,} looked at)",
            f"image bytes     {self.image_bytes:,} "
            f"({self.image_bytes / (len(self.widths) or 1):,.0f} a sample)",
            f"formats         {_counts(self.formats.most_common())}",
            f"width           {spread(self.widths)}",
            f"height          {spread(self.heights)}",
        ]
        if self.frames:
            lines.append(f"frames          {spread(self.frames)}")
        if self.label_count or not self.members:
            lines += [
                f"labels an image {_counts(sorted(self.label_count.items()))}",
                f"classes         {len(self.classes):,}, ids {min(self.classes, default=0)} to "
                f"{max(self.classes, default=0)}",
                f"  most frequent {_counts(self.classes.most_common(5))}",
                f"  rarest        {_counts(self.classes.most_common()[:-6:-1])}",
            ]
        if self.members:
            lines.append(f"planes          {_counts(self.members.most_common())}")
        for extension, counts in sorted(self.planes.items()):
            lines += counts.lines(extension, (planes or {}).get(name_of_plane(extension), PlaneFacts()))
        lines.append(f"unusable        {len(self.problems):,}")
        return lines + [f"  {problem}" for problem in self.problems[:20]]

    def add(self, other: Statistics) -> None:
        """Take in another part's counts."""
        self.samples += other.samples
        self.image_bytes += other.image_bytes
        for name in ("label_count", "classes", "formats", "members"):
            getattr(self, name).update(getattr(other, name))
        for name in ("widths", "heights", "frames", "problems"):
            getattr(self, name).extend(getattr(other, name))
        for extension, counts in other.planes.items():
            self.planes.setdefault(extension, PlaneCounts()).add(counts)

    def look(self, members: Mapping[str, Member], data: Mapping[str, bytes]) -> None:
        """Count a sample, of which `data` has the picture or video and, where there is one, the label.
        ValueError if they cannot be read."""
        labels = [read_labels(name, data[name]) for name in data if name in LABEL_EXTENSIONS]
        extension = next(name for name in data if name not in LABEL_EXTENSIONS)
        content = data[extension]
        if extension in VIDEO_EXTENSIONS:
            from megavit.data.video import check_video  # imports torch

            width, height, frames = check_video(content)
            self.frames.append(frames)
            kind = extension
        else:
            opened = open_image(content, DataConfig.max_pixels)
            width, height = upright_size(*opened.size, orientation(content))
            kind = opened.format or "?"
        self.image_bytes += len(content)
        self.widths.append(width)
        self.heights.append(height)
        self.formats[kind] += 1
        self.members.update(plane_members(members))
        for found in labels:
            self.label_count[len(found)] += 1
            self.classes.update(found)


def _counts(rows: Iterable[tuple[object, int]]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in rows)


def statistics(
    manifest: Manifest,
    cache: ShardCache,
    workers: int,
    shards: int = 0,
    *,
    decode: bool = False,
    planes: Mapping[str, PlaneFacts] | None = None,
) -> Statistics:
    """Image sizes (from the headers), formats, labels and bytes of `shards` shards, spread evenly; 0 takes
    all. With `decode`, also what the planes hold, which are what `planes` says, and a sample that training
    could not decode counts as unusable."""
    count = min(shards or len(manifest), len(manifest))
    chosen = np.unique(np.linspace(0, len(manifest) - 1, count).round().astype(int)).tolist()
    total = Statistics()
    look = partial(_shard_statistics, manifest, cache, decode, planes or {})
    for part in in_processes(look, chosen, workers, "stats"):
        total.add(part)
    return total


def _shard_statistics(
    manifest: Manifest, cache: ShardCache, decode: bool, planes: Mapping[str, PlaneFacts], shard: int
) -> Statistics:
    reader, found = ShardReader(manifest, cache), Statistics()
    trial = _trial(manifest, cache, decode, planes)
    for number in range(int(manifest.samples[shard])):
        found.samples += 1
        try:
            members = reader.members(shard, number)
            names = _looked_at(members)
            data = reader.read(shard, number, [members[name] for name in names])
            if trial:
                trial.decode(shard, number, members)
            found.look(members, dict(zip(names, data, strict=True)))
        except SampleError as error:
            found.problems.append(str(error))
        except ValueError as error:
            found.problems.append(str(reader.error(shard, number, str(error))))
    if trial:
        found.planes = dict(trial.counts)
    reader.close()
    return found


def _looked_at(members: Mapping[str, Member]) -> list[str]:
    """The extensions of a sample's picture or video, and of its label, which one with planes may lack.
    ValueError if it has not these."""
    pictures = [name for name in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) if name in members]
    labels = [name for name in LABEL_EXTENSIONS if name in members]
    if not pictures or not (labels or plane_members(members)):
        raise ValueError("no image, or neither label nor plane")
    return pictures[:1] + labels[:1]


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
    lanes = Lanes(manifest.samples, state.num_lanes, state.seed, state.block, Fraction(state.fraction))
    return manifest, Order(lanes, global_batch, skips, state)
