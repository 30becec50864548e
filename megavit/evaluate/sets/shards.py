"""Any WebDataset shards or manifest as a data set, with one label an image or several (as JFT has).

A sample that cannot be used for its label (none, no number, outside the classes) is a bad sample: its labels
are -1, and reading its image raises the reason, so that it is counted and named as a broken image is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from megavit.data.bad import SampleError
from megavit.data.cache import ShardCache
from megavit.data.class_names import class_names_beside
from megavit.data.index import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from megavit.data.labels import read_labels
from megavit.data.manifest import MANIFEST_SUFFIX, Manifest, open_shards
from megavit.data.reader import ShardReader
from megavit.data.sources import is_local, local_path
from megavit.evaluate.sets.folder import image_folder
from megavit.evaluate.sets.image_set import ImageSet, MissingData, digest_of, label_lists
from megavit.evaluate.sets.imagenet_classes import space_of

_MANY_SAMPLES = 20_000  # from here on reading the labels takes long enough for a progress bar
_FREE = 10  # so many bad samples say nothing about the others
_MOST_BAD = 0.1  # more than this share is another mistake, as a list of other classes


@dataclass(frozen=True)
class ShardImages:
    """Images of shards, in their order. `first` is int64 [shards + 1]: the number of each shard's first
    image; `numbers`, int64 [n], are those of the images of the set; `unusable` has the reason for each that
    is bad whatever its bytes are, by its place in the set."""

    reader: ShardReader
    first: np.ndarray
    numbers: np.ndarray
    unusable: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.numbers)

    def key(self, index: int) -> str:
        shard, sample = self.place(index)
        url = self.reader.manifest.urls[shard]
        return f"{url.rsplit('/', 1)[-1]}/{self.reader.key(shard, sample)}"

    def read(self, index: int) -> bytes:
        shard, sample = self.place(index)
        if index in self.unusable:
            raise self.reader.error(shard, sample, self.unusable[index])
        members = self.reader.members(shard, sample)
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        if image is None:
            reason = f"it has {', '.join(members)} but no {' or '.join(IMAGE_EXTENSIONS)}"
            raise self.reader.error(shard, sample, reason)
        return self.reader.read(shard, sample, [image])[0]

    def place(self, index: int) -> tuple[int, int]:
        """(shard, sample in it) of an image: numbers, in the order of the manifest."""
        number = int(self.numbers[index])
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        return shard, number - int(self.first[shard])


def shard_set(
    shards: str,
    name: str,
    split: Literal["train", "test"],
    class_names: Sequence[str] = (),
    *,
    multi_label: bool | None = None,
    cache: ShardCache | None = None,
    allow_pipe: bool = False,
    at_most: int | None = None,
) -> ImageSet:
    """The samples of a manifest file or of a pattern of shards.

    Args:
        shards: as `open_shards` takes it.
        class_names: by class id; without them, those in `classes.txt` beside the shards.
        multi_label: whether all labels of an image apply (`right` "all"; it may then have none). None: if any
            sample has more than one.
        cache, allow_pipe: as for `open_shards`.
        at_most: take so many samples only, spread evenly over the shards.

    Cost: one read of each label, 30 us; no image is read. MissingData without shards or class names,
    ShardError for shards that cannot be used, ValueError if more than a tenth of the labels cannot.
    """
    names = tuple(class_names) or tuple(class_names_beside(shards))
    if not names:
        raise MissingData(
            f"{name}: there are no names of classes: {Path(shards).parent / 'classes.txt'} does not exist; "
            f"it must have one name a line, in the order of the class numbers"
        )
    manifest = open_shards(shards, cache, progress=True, allow_pipe=allow_pipe)
    reader = ShardReader(manifest, cache)
    first = np.concatenate([[0], np.cumsum(manifest.samples)]).astype(np.int64)
    count = min(int(first[-1]), at_most or int(first[-1]))
    numbers = np.arange(count) * int(first[-1]) // max(1, count)
    lists: list[list[int]] = []
    unusable: dict[int, str] = {}
    for number, found in enumerate(_labels(reader, first, numbers, name)):
        lists.append([] if isinstance(found, str) else sorted(set(found)))
        if isinstance(found, str):
            unusable[number] = found
    several = multi_label if multi_label is not None else any(len(labels) > 1 for labels in lists)
    for number, labels in enumerate(lists):
        reason = "" if number in unusable else _why_unusable(labels, len(names), several)
        if reason:
            unusable[number] = reason
            lists[number] = []
    _check_bad(shards, len(lists), unusable)
    reader.close()
    return ImageSet(
        name=name,
        split=split,
        images=ShardImages(reader, first, numbers, unusable),
        labels=label_lists(lists),
        class_names=names,
        space=space_of(names),
        digest=digest_of(manifest_digest(manifest), at_most) if at_most else manifest_digest(manifest),
        right="all" if several else "one",
    )


def own_data(root: str | Path, class_names: Sequence[str] = ()) -> dict[str, ImageSet]:
    """The sets "train" and "test" in a folder of one's own, those that are there.

    It holds `train.manifest.json` or `train-*.tar`, and the same for test or else val, with `classes.txt`
    (unless `class_names` are given); or it is a folder of images (`image_folder`). MissingData if it is
    neither.
    """
    root = Path(root)
    if not root.is_dir():
        raise MissingData(f"{root} does not exist. Expected: {OWN_LAYOUT}")
    sets: dict[str, ImageSet] = {}
    parts = {"train": shards_of(root, "train"), "test": shards_of(root, "test") or shards_of(root, "val")}
    name = root.resolve().name
    if any(parts.values()):
        given = tuple(class_names)
        sets.update((split, shard_set(shards, name, split, given)) for split, shards in _known(parts))
        for split, shards in _known(parts):
            # What one split's labels mean cannot differ from the other's.
            if sets[split].right == "one" and any(other.right == "all" for other in sets.values()):
                sets[split] = shard_set(shards, name, split, given, multi_label=True)
        return sets
    if not any(path.is_dir() and not path.name.startswith(".") for path in root.iterdir()):
        raise MissingData(f"{root} holds no data set. Expected: {OWN_LAYOUT}")
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        with contextlib.suppress(MissingData):
            sets[split] = image_folder(root, split)
    if not sets:
        raise MissingData(f"{root} holds no data set. Expected: {OWN_LAYOUT}")
    return sets


OWN_LAYOUT = (
    "{train,test or val}.manifest.json or {train,test or val}-*.tar with classes.txt (launch/shards.py "
    "writes them), or folders {train,test or val}/<class>/ or <class>/ of images"
)


def _known(parts: Mapping[str, str]) -> Iterator[tuple[Literal["train", "test"], str]]:
    for split in ("train", "test"):
        if parts[split]:
            yield split, parts[split]


def shards_of(root: Path, part: str) -> str:
    """The manifest or the pattern of a part of the data; "" if there is none."""
    manifest = root / f"{part}{MANIFEST_SUFFIX}"
    if manifest.is_file():
        return str(manifest)
    return f"{root}/{part}-*.tar" if any(root.glob(f"{part}-*.tar")) else ""


def _labels(
    reader: ShardReader, first: np.ndarray, numbers: np.ndarray, name: str
) -> Iterator[list[int] | str]:
    """The labels of these samples as they are written, or why they cannot be had."""
    shards = np.searchsorted(first, numbers, "right") - 1
    shown = len(numbers) >= _MANY_SAMPLES
    with tqdm(total=len(numbers), desc=f"labels of {name}", unit="image", disable=not shown) as bar:
        for group in np.split(numbers, np.flatnonzero(np.diff(shards)) + 1):
            if not len(group):
                continue
            shard = int(np.searchsorted(first, group[0], "right")) - 1
            reader.fetch([shard])
            for number in group.tolist():
                yield _label(reader, shard, number - int(first[shard]))
                bar.update()


def _label(reader: ShardReader, shard: int, sample: int) -> list[int] | str:
    try:
        members = reader.members(shard, sample)
        label = next((members[name] for name in LABEL_EXTENSIONS if name in members), None)
        if label is None:
            return f"it has {', '.join(members)} but no {' or '.join(LABEL_EXTENSIONS)}"
        return read_labels(label.extension, reader.read(shard, sample, [label])[0])
    except SampleError as error:
        return error.bad.reason
    except ValueError as error:
        return str(error)


def _why_unusable(labels: Sequence[int], num_classes: int, several: bool) -> str:
    outside = next((label for label in labels if not 0 <= label < num_classes), None)
    if outside is not None:
        return f"label {outside} is outside 0..{num_classes - 1}, the classes that have names"
    if not several and len(labels) != 1:
        return f"it has {len(labels)} labels in a set of one label an image"
    return ""


def _check_bad(shards: str, given: int, unusable: Mapping[int, str]) -> None:
    if len(unusable) == given or len(unusable) > max(_FREE, _MOST_BAD * given):
        number, reason = next(iter(unusable.items()))
        raise ValueError(
            f"{len(unusable)} of the {given} samples of {shards} have no usable label, the first (number "
            f"{number}) because {reason}; do the classes belong to these shards?"
        )


def manifest_digest(manifest: Manifest) -> str:
    """Of the content where every shard has checksums, which reading verifies; else of what the shards are
    called and hold, with the sizes and times of local files."""
    if manifest.checksum_digest != manifest.digest:
        return digest_of("shards", manifest.checksum_digest)
    stats = [local_path(url).stat() for url in manifest.urls if is_local(url) and local_path(url).exists()]
    return digest_of("shards", manifest.digest, *((stat.st_size, stat.st_mtime_ns) for stat in stats))
