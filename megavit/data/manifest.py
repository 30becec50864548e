"""Which shards a run reads, with their sample counts, and where their indexes are.

A manifest file (`NAME.manifest.json`) holds one column a property, so that 400,000 shards load in a second or
two. Shards named by a pattern are taken with the index files beside them (`SHARD.tar.idx`), or else walked in
memory.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import braceexpand
import numpy as np
from tqdm import tqdm

from megavit.data.cache import ShardCache
from megavit.data.index import INDEX_SUFFIX, ShardError, ShardIndex, index_header, index_shard, read_index
from megavit.data.sources import is_local, local_path

MANIFEST_SUFFIX = ".manifest.json"
DATA_FILE = "data.json"  # in a run folder: which shards it reads, in which order
_FORMAT = "megavit-manifest-1"
_MANY_SHARDS = 200  # from here on indexing takes long enough for a progress bar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Manifest:
    """The shards in order; column i of each field is shard i.

    `indexes[i]` is the path of the index file, or the content of one that exists in memory only. Pickled to
    every worker: about 200 bytes a shard (in memory: 24 bytes a member and the keys).
    """

    urls: tuple[str, ...]
    samples: np.ndarray  # int64 [shards]
    shard_bytes: np.ndarray  # int64 [shards]
    digests: tuple[str, ...]
    indexes: tuple[str | bytes, ...]

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def num_samples(self) -> int:
        return int(self.samples.sum())

    @property
    def digest(self) -> str:
        """Names shard names, order, counts, sizes and contents; not the folder, so that data may move."""
        found = blake2b(digest_size=16)
        for row in self._rows():
            found.update(f"{row}\n".encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def index(self, shard: int, check: bool = True) -> ShardIndex:
        """Shard's index. ShardError if its file is missing, damaged or not the one that was listed."""
        stored = self.indexes[shard]
        name = f"of {self.urls[shard]}" if isinstance(stored, bytes) else stored
        found = (
            ShardIndex.from_bytes(stored, name, check=False)
            if isinstance(stored, bytes)
            else read_index(stored, check)
        )
        if len(found) != self.samples[shard]:
            raise ShardError(
                f"index {name} has {len(found)} samples, the manifest {int(self.samples[shard])}; make them "
                f"again with launch/shards.py index"
            )
        return found

    def difference(self, before: Manifest) -> str:
        """What changed since `before`, in a sentence that names a shard; empty if nothing did."""
        mine, theirs = list(self._rows()), list(before._rows())
        if mine == theirs:
            return ""
        totals = (
            f"{len(self):,} shards with {self.num_samples:,} samples now, "
            f"{len(before):,} with {before.num_samples:,} before"
        )
        for number, (new, old) in enumerate(zip(mine, theirs, strict=False)):
            if new != old:
                return (
                    f"{totals}; first difference at shard {number}: {_describe(old)} is now {_describe(new)}"
                )
        longer, what = (mine, "added") if len(mine) > len(theirs) else (theirs, "gone")
        return f"{totals}; {_describe(longer[min(len(mine), len(theirs))])} is {what}"

    def save(self, path: str | Path) -> None:
        """Write the manifest file; local shards and indexes below its folder are stored relative to it."""
        path = Path(path)
        base = path.parent.resolve()
        if any(isinstance(index, bytes) for index in self.indexes):
            raise ValueError("a manifest of shards without index files cannot be saved; index them first")
        columns = {
            "format": _FORMAT,
            "digest": self.digest,
            "urls": [_relative(url, base) if is_local(url) else url for url in self.urls],
            "samples": self.samples.tolist(),
            "bytes": self.shard_bytes.tolist(),
            "digests": self.digests,
            "indexes": [_relative(str(index), base) for index in self.indexes],
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(columns) + "\n")
        os.replace(partial, path)

    def _rows(self) -> Iterator[tuple[str, int, int, str]]:
        names = (url if url.startswith("pipe:") else url.rsplit("/", 1)[-1] for url in self.urls)
        return zip(names, self.samples.tolist(), self.shard_bytes.tolist(), self.digests, strict=True)


def _describe(row: tuple[str, int, int, str]) -> str:
    return f"{row[0]} ({row[1]:,} samples, {row[2]:,} bytes, content {row[3][:8]})"


def _relative(path: str, base: Path) -> str:
    absolute = Path(path).resolve()
    return str(absolute.relative_to(base)) if absolute.is_relative_to(base) else str(absolute)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest in a file. ShardError if it is missing, damaged or of another version."""
    path = Path(path)
    try:
        columns = json.loads(path.read_text())
        if columns["format"] != _FORMAT:
            raise ValueError(f"its format is {columns['format']!r}")
        base = path.parent
        manifest = Manifest(
            urls=tuple(str(base / url) if is_local(url) else url for url in columns["urls"]),
            samples=np.array(columns["samples"], np.int64),
            shard_bytes=np.array(columns["bytes"], np.int64),
            digests=tuple(columns["digests"]),
            indexes=tuple(str(base / index) for index in columns["indexes"]),
        )
        if manifest.digest != columns["digest"]:
            raise ValueError("its digest differs from its content")
    except FileNotFoundError as error:
        raise ShardError(f"manifest {path} does not exist; write it with launch/shards.py index") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ShardError(
            f"manifest {path} cannot be used: {error}; write it again with launch/shards.py index"
        ) from error
    if not len(manifest):
        raise ShardError(f"manifest {path} lists no shards")
    return manifest


def expand_shards(pattern: str) -> list[str]:
    """Urls of a pattern with braces (`{000..009}`) and, for local paths, wildcards (`*`), in order.

    ShardError if a local shard does not exist.
    """
    urls: list[str] = []
    for part in [pattern] if pattern.startswith("pipe:") and "{" not in pattern else _braces(pattern):
        if not is_local(part):
            urls.append(part)
            continue
        part = str(local_path(part))
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise ShardError(
                f"shard {part} does not exist (from {pattern!r}); write it with launch/shards.py, or name a "
                f"manifest, with which missing shards are counted"
            )
        urls.extend(found)
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise ShardError(f"shard {twice[0]} is named twice by {pattern!r}")
    return urls


def _braces(pattern: str) -> Iterable[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ShardError(f"shard pattern {pattern!r}: {error}") from error


def open_shards(spec: str, cache: ShardCache | None = None, *, progress: bool = False) -> Manifest:
    """The shards of a manifest file (`*.manifest.json`) or of a pattern. ShardError for damage.

    A pattern's shards need to be there: their headers are read unless an index file lies beside them, and
    remote ones are fetched whole for it, so name a manifest for many. Holds the indexes it made in memory.
    """
    if spec.endswith(MANIFEST_SUFFIX):
        return read_manifest(spec)
    urls = expand_shards(spec)

    def locate(url: str) -> str | bytes:
        beside = url + INDEX_SUFFIX
        if is_local(url) and os.path.isfile(beside):
            return beside
        path = url if is_local(url) else (cache or _no_cache(url)).get(url)
        return index_shard(path, checksums=False, name=url).to_bytes()

    with ThreadPoolExecutor(min(16, len(urls))) as pool:
        show = progress and len(urls) >= _MANY_SHARDS
        indexes = list(
            tqdm(pool.map(locate, urls), f"index {spec}", len(urls), unit="shard", disable=not show)
        )
    return _manifest(urls, indexes)


def _no_cache(url: str) -> ShardCache:
    raise ShardError(f"shard {url} is remote: it needs a cache folder (--data.cache_dir)")


def _manifest(urls: Sequence[str], indexes: Sequence[str | bytes]) -> Manifest:
    headers = [
        json.loads(index.partition(b"\n")[0]) if isinstance(index, bytes) else index_header(index)
        for index in indexes
    ]
    return Manifest(
        urls=tuple(urls),
        samples=np.array([header["samples"] for header in headers], np.int64),
        shard_bytes=np.array([header["shard_bytes"] for header in headers], np.int64),
        digests=tuple(header["digest"] for header in headers),
        indexes=tuple(indexes),
    )


def write_index(shard: str | Path, index_path: str | Path, name: str | None = None) -> None:
    """Index one shard, with checksums, into a file that appears when complete."""
    partial = Path(f"{index_path}.{os.getpid()}.partial")
    try:
        partial.write_bytes(index_shard(shard, name=name).to_bytes())
        os.replace(partial, index_path)
    finally:
        partial.unlink(missing_ok=True)


def index_pattern(pattern: str, out: Path, workers: int, cache: ShardCache) -> Manifest:
    """Index every shard of `pattern` into `out`, in `workers` processes; the caller saves the manifest.

    An index that is newer than its shard and states its size is kept, so an interrupted run is continued by
    running it again. Raises ShardError naming every shard that is missing or damaged, after indexing the
    others.
    """
    urls = expand_shards(pattern)
    out.mkdir(parents=True, exist_ok=True)
    names = [url.rsplit("/", 1)[-1] if not url.startswith("pipe:") else "pipe" for url in urls]
    shared = {name for name, count in Counter(names).items() if count > 1}
    paths = [
        out / (f"{name}.{_short(url)}{INDEX_SUFFIX}" if name in shared else name + INDEX_SUFFIX)
        for name, url in zip(names, urls, strict=True)
    ]
    jobs = [(url, path, cache) for url, path in zip(urls, paths, strict=True)]
    failed = [error for error in in_processes(_index_one, jobs, workers, f"index into {out}") if error]
    if failed:
        raise ShardError("\n".join([f"{len(failed)} of {len(urls)} shards cannot be indexed:", *failed]))
    return _manifest(urls, [str(path) for path in paths])


def _short(url: str) -> str:
    return blake2b(url.encode(), digest_size=4).hexdigest()


def _index_one(job: tuple[str, Path, ShardCache]) -> str:
    url, path, cache = job
    try:
        shard = Path(url) if is_local(url) else cache.get(url)
        if not _is_current(path, shard, is_local(url)):
            write_index(shard, path, name=url)
    except ValueError as error:
        return str(error)
    return ""


def _is_current(index: Path, shard: Path, compare_times: bool) -> bool:
    if not index.is_file() or (compare_times and index.stat().st_mtime < shard.stat().st_mtime):
        return False
    try:
        read_index(index)
    except ShardError:
        return False
    return bool(index_header(index)["shard_bytes"] == shard.stat().st_size)


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str
) -> Iterator[Result]:
    """`function` of every item, in order, in up to `workers` processes, with a progress bar on a terminal."""
    workers = min(workers, len(items))
    with tqdm(total=len(items), desc=title, unit="shard") as bar:
        if workers <= 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        pool = ProcessPoolExecutor(workers, mp_context=get_context("forkserver"))
        try:
            for result in pool.map(function, items, chunksize=max(1, min(16, len(items) // (4 * workers)))):
                yield result
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
