"""Reads samples by (shard, index): one `pread` and one checksum a member, from local shards or cached remote
ones."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from isal.isal_zlib import crc32

from megavit.data.bad import BadSample, SampleError
from megavit.data.cache import ShardCache
from megavit.data.index import SOURCE_EXTENSION, Member, ShardError, ShardIndex
from megavit.data.manifest import Manifest
from megavit.data.sources import SourceError, is_local, open_regular

_MAX_OPEN = 128  # files, and as many index maps: far below the usual limit of 1,024 descriptors
_MEMORY_S = 60.0  # a shard that failed is not tried again for so long
_PARALLEL_FETCHES = 8
_MAX_SOURCE_BYTES = 4096  # the longest path that Linux has


class _Lru:
    """The most recently used values, by shard; `drop` is called on what falls out."""

    def __init__(self, most: int, drop: Callable[[Any], None] = lambda value: None):
        self._most, self._drop = most, drop
        self._values: dict[int, Any] = {}

    def __contains__(self, shard: int) -> bool:
        return shard in self._values

    def get(self, shard: int, make: Callable[[int], Any]) -> Any:
        value = self._values.pop(shard) if shard in self._values else make(shard)
        self.put(shard, value)
        return value

    def put(self, shard: int, value: Any) -> None:
        if len(self._values) >= self._most:
            self._drop(self._values.pop(next(iter(self._values))))
        self._values[shard] = value  # most recent last

    def forget(self, shard: int) -> None:
        if shard in self._values:
            self._drop(self._values.pop(shard))


class ShardReader:
    """Random access to the samples of a manifest. Every failure is a SampleError that names shard and key.

    Pickles to worker processes; open files do not travel. Each process keeps up to 128 shards open.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None):
        self.manifest, self._cache = manifest, cache
        self.has_remote = not all(map(is_local, manifest.urls))
        self._reset()

    def _reset(self) -> None:
        self._files = _Lru(_MAX_OPEN, os.close)
        self._indexes = _Lru(_MAX_OPEN)
        self._checked: set[int] = set()
        self._failed: dict[int, tuple[float, str]] = {}
        self._mutex = threading.Lock()  # of `fetch`: everything else runs in one thread

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("manifest", "_cache", "has_remote")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._files._values:
            self._files.forget(next(iter(self._files._values)))

    def key(self, shard: int, index: int) -> str:
        """The sample's `__key__`; `#index` if the shard's index cannot be read."""
        try:
            return self._index(shard).key(index)
        except ShardError:
            return f"#{index}"

    def members(self, shard: int, index: int) -> dict[str, Member]:
        """The sample's members by extension."""
        try:
            return self._index(shard).sample(index)
        except ShardError as error:
            raise self.error(shard, index, str(error), whole_shard=True) from error

    def read(self, shard: int, index: int, members: Collection[Member]) -> list[bytes]:
        """The bytes of some members of a sample. Raises SampleError for a missing shard, a short read and a
        checksum that differs."""
        file = self._open(shard, index)
        found = []
        for member in members:
            data = self._pread(shard, index, file, member)
            if len(data) != member.size:
                raise self.error(
                    shard,
                    index,
                    f"its {member.extension} is cut off: the shard has become shorter{self._where(shard)}",
                )
            if member.crc32 is not None and crc32(data) != member.crc32:
                raise self.error(
                    shard,
                    index,
                    f"the checksum of its {member.extension} differs: it is damaged{self._where(shard)}",
                )
            found.append(data)
        return found

    def file(self, shard: int) -> int:
        """A shard's open file, until others have taken its place. OSError, SourceError or ShardError if it
        cannot be opened."""
        found: int = self._files.get(shard, self._open_file)
        return found

    def fetch(self, shards: Collection[int]) -> None:
        """Open remote shards, fetching several at a time, before samples of them are read one by one.

        They are held open, so that a cache smaller than a batch's shards may evict them meanwhile. Failures
        are left for `read` to report.
        """
        if not self.has_remote or self._cache is None:
            return
        remote = [shard for shard in shards if not is_local(self.manifest.urls[shard])]
        for shard in remote:
            if shard in self._files:
                os.utime(self.file(shard))  # what is in use is evicted last
        missing = [shard for shard in remote if shard not in self._files]
        if missing:
            with ThreadPoolExecutor(_PARALLEL_FETCHES) as pool:
                list(pool.map(self._try_fetch, missing))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start fetching remote shards in the background."""
        if self._cache is not None:
            wanted = [(self.manifest.urls[shard], int(self.manifest.shard_bytes[shard])) for shard in shards]
            self._cache.prefetch([(url, size) for url, size in wanted if not is_local(url)])

    def _try_fetch(self, shard: int) -> None:
        try:
            file = self._open_file(shard)
        except SourceError:
            return  # remembered by the cache; `read` reports it sample by sample
        with self._mutex:
            self._files.put(shard, file)

    def _pread(self, shard: int, index: int, file: int, member: Member) -> bytes:
        try:
            return os.pread(file, member.size, member.offset)
        except MemoryError as error:
            reason = f"its {member.extension} of {member.size} bytes does not fit into memory"
            raise self.error(shard, index, reason) from error
        except OSError:
            # A network file system may have replaced the file or dropped the handle: once more with a new
            # one.
            self._files.forget(shard)
        try:
            return os.pread(self._open(shard, index), member.size, member.offset)
        except OSError as error:
            raise self.error(shard, index, f"reading failed: {error.strerror}") from error

    def _open(self, shard: int, index: int) -> int:
        if shard in self._failed:
            until, reason = self._failed[shard]
            if time.monotonic() < until:
                raise self.error(shard, index, reason, whole_shard=True)
        try:
            return self.file(shard)
        except (OSError, SourceError, ShardError) as error:
            reason = (
                f"the shard cannot be opened: {error.strerror}" if isinstance(error, OSError) else str(error)
            )
            self._failed[shard] = (time.monotonic() + _MEMORY_S, reason)
            raise self.error(shard, index, reason, whole_shard=True) from error

    def _open_file(self, shard: int) -> int:
        url, size = self.manifest.urls[shard], int(self.manifest.shard_bytes[shard])
        if not is_local(url):
            if self._cache is None:
                raise SourceError(f"{url} is remote: it needs a cache folder (--data.cache_dir)")
            return self._cache.open(url, size)
        file = open_regular(url)
        on_disk = os.fstat(file).st_size
        # With checksums every sample speaks for itself, and what is left of a cut-off shard is used.
        if on_disk != size and not self._index(shard).has_checksums:
            os.close(file)
            raise ShardError(f"the shard has {on_disk} bytes, its index says {size}")
        return file

    def _where(self, shard: int) -> str:
        """Names the file that a remote shard was read from: the damage may be of that copy alone."""
        url = self.manifest.urls[shard]
        return "" if is_local(url) or self._cache is None else f" (in the copy {self._cache.place(url)})"

    def _index(self, shard: int) -> ShardIndex:
        found: ShardIndex = self._indexes.get(shard, self._load_index)
        return found

    def _load_index(self, shard: int) -> ShardIndex:
        index = self.manifest.index(shard, check=shard not in self._checked)
        self._checked.add(shard)
        return index

    def error(self, shard: int, index: int, reason: str, whole_shard: bool = False) -> SampleError:
        """What is wrong with a sample, with its key and the file that it was made from."""
        source = "" if whole_shard else self._source(shard, index)
        key = self.key(shard, index)
        return SampleError(BadSample(self.manifest.urls[shard], key, reason, whole_shard, source))

    def _source(self, shard: int, index: int) -> str:
        """The file that a sample was made from; '' if its shard does not tell, or cannot be read."""
        try:
            member = self._index(shard).sample(index).get(SOURCE_EXTENSION)
            if member is None:
                return ""
            text = os.pread(self.file(shard), min(member.size, _MAX_SOURCE_BYTES), member.offset)
        except (OSError, SourceError, ShardError):
            return ""
        return text.decode("utf-8", "replace")
