"""Which shards a run reads, with their sample counts, and where their indexes are.

A manifest file (`NAME.manifest.json`) holds one column a property, so that 400,000 shards load in a few
seconds. Shards named by a pattern are taken with the index files beside them (`SHARD.tar.idx`), or else
walked in memory.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from megavit.data.cache import ShardCache
from megavit.data.identity import ShardRow, same_content
from megavit.data.index import INDEX_SUFFIX, ShardError, ShardIndex, index_header, index_shard, read_index
from megavit.data.json_data import json_field, kind_of, parse_json
from megavit.data.patterns import expand_shards
from megavit.data.sources import is_command, is_local
from megavit.data.worker import end_with_parent

MANIFEST_SUFFIX = ".manifest.json"
DATA_FILE = "data.json"  # in a run folder: which shards it reads, in which order
_FORMAT = "megavit-manifest-1"
_MANY_SHARDS = 200  # from here on indexing takes long enough for a progress bar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Manifest:
    """The shards in order; column i of each field is shard i.

    `digests` are those of the index files, and `contents` those without checksums. `indexes[i]` is the path
    of the index file, or the content of one that exists in memory only. Pickled to every worker: about 300
    bytes a shard (in memory: 24 bytes a member and the keys).
    """

    urls: tuple[str, ...]
    samples: np.ndarray  # int64 [shards]
    shard_bytes: np.ndarray  # int64 [shards]
    digests: tuple[str, ...]
    contents: tuple[str, ...]
    indexes: tuple[str | bytes, ...]

    def __len__(self) -> int:
        return len(self.urls)

    @property
    def num_samples(self) -> int:
        return int(self.samples.sum())

    @cached_property
    def digest(self) -> str:
        """Names shard names, order, counts, sizes and contents; not the folder, so that data may move, and
        not the checksums, which may become known later."""
        return self._digest(self.contents)

    @property
    def checksum_digest(self) -> str:
        """As `digest`, with the checksums; the same as `digest` unless every shard has them."""
        known = all(map(str.__ne__, self.digests, self.contents))
        return self._file_digest if known else self.digest

    @cached_property
    def _file_digest(self) -> str:
        return self.digest if self.digests == self.contents else self._digest(self.digests)

    def _digest(self, column: tuple[str, ...]) -> str:
        found = blake2b(digest_size=16)
        for row in self._rows_with(column):
            found.update(f"{row}\n".encode("utf-8", "surrogateescape"))
        return found.hexdigest()

    def _rows_with(self, *columns: tuple[str, ...]) -> Iterable[tuple]:
        names = (url if is_command(url) else url.rsplit("/", 1)[-1] for url in self.urls)
        return zip(names, self.samples.tolist(), self.shard_bytes.tolist(), *columns, strict=True)

    def is_same(self, digest: str, checksum_digest: str) -> bool:
        """Whether a run that saved these two read the same data, as far as both know.

        Before there were two, `digest` was that of the index files, with checksums or without.
        """
        mine = (self.digest, self.checksum_digest)
        return same_content(mine, (digest, checksum_digest)) or digest == self._file_digest

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

    def rows(self) -> list[ShardRow]:
        """The shards as they are compared with those of another time."""
        return [ShardRow(*row) for row in self._rows_with(self.contents, self.digests)]

    def save(self, path: str | Path) -> None:
        """Write the manifest file; local shards and indexes below its folder are stored relative to it."""
        path = Path(path)
        base = path.parent.resolve()
        if any(isinstance(index, bytes) for index in self.indexes):
            raise ValueError("a manifest of shards without index files cannot be saved; index them first")
        columns = {
            "format": _FORMAT,
            "digest": self._file_digest,
            "content_digest": self.digest,
            "urls": [_relative(url, base) if is_local(url) else url for url in self.urls],
            "samples": self.samples.tolist(),
            "bytes": self.shard_bytes.tolist(),
            "digests": self.digests,
            "contents": self.contents,
            "indexes": [_relative(str(index), base) for index in self.indexes],
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(columns) + "\n")
        os.replace(partial, path)


def _relative(path: str, base: Path) -> str:
    absolute = Path(path).resolve()
    return str(absolute.relative_to(base)) if absolute.is_relative_to(base) else str(absolute)


def read_manifest(path: str | Path, *, allow_pipe: bool = False) -> Manifest:
    """The manifest in a file. ShardError if it is missing, damaged or of another version, or, without
    `allow_pipe`, if it names shell commands: whoever gives data to others must not run programs there."""
    path = Path(path)
    try:
        columns = parse_json(path.read_bytes())
        if json_field(columns, "format", str) != _FORMAT:
            raise ValueError(f"its format is {columns['format'][:40]!r}")
        manifest = _from_columns(columns, path.parent)
    except FileNotFoundError as error:
        raise ShardError(f"manifest {path} does not exist; write it with launch/shards.py index") from error
    except OSError as error:
        raise ShardError(f"manifest {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ShardError(
            f"manifest {path} cannot be used: {error}; write it again with launch/shards.py index"
        ) from error
    if not len(manifest):
        raise ShardError(f"manifest {path} lists no shards")
    for number, url in enumerate(manifest.urls):
        if is_command(url) and not allow_pipe:
            raise ShardError(
                f"manifest {path}: shard {number} is the shell command {url!r}, which only runs with "
                f"--data.allow_pipe (--allow_pipe of launch/shards.py)"
            )
    return manifest


def _from_columns(columns: dict, base: Path) -> Manifest:
    """The manifest that `Manifest.save` stored as JSON. ValueError for anything else."""
    urls, indexes = _strings(columns, "urls"), _strings(columns, "indexes")
    manifest = Manifest(
        urls=tuple(str(base / url) if is_local(url) else url for url in urls),
        samples=np.array(_counts(columns, "samples"), np.int64),
        shard_bytes=np.array(_counts(columns, "bytes"), np.int64),
        digests=tuple(_strings(columns, "digests")),
        # A manifest written before this column was there knows only what its index files are called.
        contents=tuple(_strings(columns, "contents" if "contents" in columns else "digests")),
        indexes=tuple(str(base / index) for index in indexes),
    )
    lengths = {len(columns[name]) for name in ("urls", "samples", "bytes", "digests", "indexes")}
    if lengths != {len(manifest.contents)}:
        raise ValueError("its columns are of different lengths")
    if manifest._file_digest != json_field(columns, "digest", str) or manifest.digest != columns.get(
        "content_digest", manifest.digest
    ):
        raise ValueError("its digest differs from its content")
    return manifest


def _strings(columns: dict, name: str) -> list[str]:
    values = json_field(columns, name, list)
    for number, value in enumerate(values):
        if type(value) is not str or "\0" in value:
            raise ValueError(f"entry {number} of its {name!r} is {kind_of(value)}, not a path or name")
    return values


def _counts(columns: dict, name: str) -> list[int]:
    values = json_field(columns, name, list)
    for number, value in enumerate(values):
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise ValueError(f"entry {number} of its {name!r} is {kind_of(value)}, not a count from 0 on")
    return values


def open_shards(
    spec: str, cache: ShardCache | None = None, *, progress: bool = False, allow_pipe: bool = False
) -> Manifest:
    """The shards of a manifest file (`*.manifest.json`) or of a pattern. ShardError for damage.

    A pattern's shards need to be there: their headers are read unless an index file lies beside them, and
    remote ones are fetched whole for it, so name a manifest for many. Holds the indexes it made in memory. A
    pattern may be a shell command; with `allow_pipe` a manifest's shards may be as well.
    """
    if spec.endswith(MANIFEST_SUFFIX):
        return read_manifest(spec, allow_pipe=allow_pipe)
    urls = expand_shards(spec)

    def locate(url: str) -> str | bytes:
        beside = url + INDEX_SUFFIX
        if is_local(url) and os.path.isfile(beside):
            return beside
        with _located(url, cache) as shard:
            return index_shard(shard, checksums=False, name=url).to_bytes()

    with ThreadPoolExecutor(min(16, len(urls))) as pool:
        show = progress and len(urls) >= _MANY_SHARDS
        indexes = list(
            tqdm(pool.map(locate, urls), f"index {spec}", len(urls), unit="shard", disable=not show)
        )
    return _manifest(urls, indexes)


@contextmanager
def _located(url: str, cache: ShardCache | None) -> Iterator[str | int]:
    """A local shard's path, or the descriptor of a remote one, which stays valid while it is used.

    A remote one that turns out to be no shard leaves the cache: a login page that came with status 200 would
    be found there for ever.
    """
    if is_local(url):
        yield url
        return
    if cache is None:
        raise ShardError(f"shard {url} is remote: it needs a cache folder (--data.cache_dir)")
    file = cache.open(url)
    try:
        yield file
    except ShardError as error:
        raise ShardError(f"{error}; it was fetched as {cache.discard(url)}, now deleted") from error
    finally:
        os.close(file)


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
        contents=tuple(header["content"] for header in headers),
        indexes=tuple(indexes),
    )


def write_index(shard: str | Path | int, index_path: str | Path, name: str | None = None) -> None:
    """Index one shard (its path or a descriptor), with checksums, into a file that appears when complete."""
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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"the folder {out} for the indexes cannot be made: {error.strerror}") from error
    names = ["pipe" if is_command(url) else url.rsplit("/", 1)[-1] for url in urls]
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
    return blake2b(url.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


def _index_one(job: tuple[str, Path, ShardCache]) -> str:
    url, path, cache = job
    try:
        with _located(url, cache) as shard:
            if not _is_current(path, os.stat(shard), is_local(url)):
                write_index(shard, path, name=url)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"index {path} cannot be written: {error.strerror}"
    return ""


def _is_current(path: Path, shard: os.stat_result, compare_times: bool) -> bool:
    if not path.is_file() or (compare_times and path.stat().st_mtime < shard.st_mtime):
        return False
    try:
        return read_index(path).shard_bytes == shard.st_size
    except ShardError:
        return False


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
        pool = ProcessPoolExecutor(workers, get_context("forkserver"), initializer=end_with_parent)
        try:
            for result in pool.map(function, items, chunksize=max(1, min(16, len(items) // (4 * workers)))):
                yield result
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
