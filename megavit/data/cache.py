"""Complete shards on a node's disk: fetched once for all of its processes, bounded in bytes.

A remote shard counts as present only when it is complete: it is fetched into a temporary file, its length and
the exit status of its command are checked, and only then does it get its name. What is in it is not read
here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megavit.data.sources import Fetch, SourceError, fetcher, is_local, local_path, open_regular

_NAME = re.compile(r"[0-9a-f]{32}(-.*|\.part)")  # all that is ever deleted: a folder may hold other files
_REMEMBER_FAILURE_S = 60.0
_RETRIED_4XX = (408, 425, 429)  # request timeout, too early, too many requests
_FULL = (errno.ENOSPC, errno.EDQUOT)
_jitter = random.Random()  # an own one: drawing from the global one would move the user's seeded stream


class ShardCache:
    """Complete shards on this node's disk, shared by all of its processes and bounded in bytes.

    One process fetches a shard while the others wait for it, under a lock that the kernel drops when the
    holder is killed. Least recently used files go first. A file is named by a digest of the full url, so that
    equal basenames do not meet. A url is taken to mean the same bytes for ever, apart from its `size`.

    Disk: `max_bytes`, plus the shards being fetched at the moment and those that were evicted while somebody
    reads them; a single larger shard stays while it is the newest. A hit costs one open, one stat and one
    utime.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int, attempts: int = 5, timeout_s: float = 60, threads: int = 8
    ):
        """An empty `folder` is `default_folder()`. A try fails when no byte arrives for `timeout_s`;
        `prefetch` fetches `threads` shards at once."""
        self.folder = Path(folder) if folder else default_folder()
        self.max_bytes = max_bytes
        self.attempts = attempts
        self.timeout_s = timeout_s
        self.threads = threads
        self._start_empty()

    def _start_empty(self) -> None:
        self._mutex = threading.Lock()
        self._failures: dict[str, tuple[float, str]] = {}  # url -> (monotonic time, message)
        self._queue: dict[str, int | None] = {}  # urls to prefetch, in order
        self._running = 0

    def open(self, url: str, size: int | None = None) -> int:
        """A read-only file descriptor of a complete shard, which stays readable when the file is evicted; a
        path could be gone before it is opened. The caller closes it.

        A local url's own file is opened, unchecked. With `size` (bytes) any other length of a fetched one is
        an error. Raises SourceError, at once if this url failed here within the last minute.
        """
        try:
            if is_local(url):
                return open_regular(local_path(url))
            descriptor = self._open_cached(_file_name(url), size)
            return self._fetch(url, size) if descriptor is None else descriptor
        except OSError as error:
            hint = (
                f"; the disk of {self.folder} is full: free some, or lower --data.cache_gb"
                if error.errno in _FULL
                else ""
            )
            failure = SourceError(f"shard {url}: {_describe(error)}{hint}")
            self._remember(url, failure)
            raise failure from error
        except SourceError as error:
            self._remember(url, error)
            raise

    def place(self, url: str) -> Path:
        """The file that a remote shard has or would have, for messages: it may be gone at any time."""
        return self.folder / _file_name(url)

    def discard(self, url: str) -> Path:
        """Forget a shard that turned out to be useless, and return where it was."""
        self.place(url).unlink(missing_ok=True)
        return self.place(url)

    def prefetch(self, urls_and_sizes: Iterable[tuple[str, int | None]]) -> None:
        """Start fetching in daemon threads and return at once. Never raises: `open` of the same url tells.

        What is prefetched must fit into `max_bytes` until it is used, or the first are evicted for the last.
        """
        with self._mutex:
            self._queue |= {url: size for url, size in urls_and_sizes if not is_local(url)}
            while self._running < min(self.threads, len(self._queue)):
                self._running += 1
                # Not a ThreadPoolExecutor: the interpreter waits for its threads at exit, up to minutes here.
                threading.Thread(target=self._prefetch_queued, name="shard-prefetch", daemon=True).start()

    def _prefetch_queued(self) -> None:
        while True:
            with self._mutex:
                if not self._queue:
                    self._running -= 1
                    return
                url = next(iter(self._queue))
                size = self._queue.pop(url)
            with suppress(Exception):  # remembered; whoever needs the shard is told
                os.close(self.open(url, size))

    def _open_cached(self, name: str, size: int | None) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        os.utime(descriptor)  # the order of eviction
        return descriptor

    def _lock_path(self, name: str) -> Path:
        """One of 4096 lock files: few to keep, yet fetches of different shards seldom wait for each other."""
        return self.folder / "locks" / name[:3]

    def _fetch(self, url: str, size: int | None) -> int:
        """Fetch under the shard's lock, unless another thread or process did while this one waited for it."""
        waiting_since, name = time.time(), _file_name(url)
        self._raise_recent_failure(url)
        fetch = fetcher(url)
        part = self.folder / f"{name[:32]}.part"
        self._lock_path(name).parent.mkdir(parents=True, exist_ok=True)
        with open(self._lock_path(name), "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # by open file: threads exclude each other as processes do
            descriptor = self._open_cached(name, size)
            if descriptor is not None:
                return descriptor
            lock.seek(0)
            failed_at, _, failure = lock.read().partition("\n")
            if failure.startswith(name) and float(failed_at) > waiting_since:
                # Else all processes of a node would try a dead url one after the other, for minutes each.
                raise SourceError(failure.removeprefix(f"{name}\n"))
            self._evict(room=size or 0)
            try:
                self._fetch_with_retries(fetch, url, size, part)
                descriptor = os.open(part, os.O_RDONLY)  # before it has a name that others may evict
                os.replace(part, self.folder / name)
            except SourceError as error:
                lock.truncate(0)
                lock.write(f"{time.time()}\n{name}\n{error}")
                raise
            finally:
                part.unlink(missing_ok=True)
        self._evict(keep=name)
        return descriptor

    def _fetch_with_retries(self, fetch: Fetch, url: str, size: int | None, part: Path) -> None:
        for count in range(1, self.attempts + 1):
            part.unlink(missing_ok=True)  # a new file: a cancelled attempt may still write into the old one
            try:
                announced = fetch(url, part, self.timeout_s)
                actual = part.stat().st_size
                expected = announced if size is None else size
                if expected is not None and actual != expected:
                    raise OSError(f"received {actual} bytes instead of {expected}")
                return
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                if count >= (min(2, self.attempts) if _is_permanent(error) else self.attempts):
                    raise SourceError(
                        f"shard {url}: not to be had in {count} attempts; the last: {_describe(error)}"
                    ) from error
            time.sleep(min(30, 0.5 * 2 ** (count - 1)) * _jitter.uniform(0.5, 1))

    def _evict(self, keep: str = "", room: int = 0) -> None:
        """Delete what killed processes left, then least recently used shards until `room` more bytes fit."""
        found, total = [], room
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    if entry.name.endswith(".part"):
                        self._delete_if_abandoned(entry)
                    with suppress(FileNotFoundError):  # another process evicts as well
                        stat = os.stat(entry.path)
                        total += stat.st_size
                        found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        for _, name, size in sorted(found):
            if total <= self.max_bytes:
                break
            if name != keep and "-" in name:
                (self.folder / name).unlink(missing_ok=True)
                total -= size

    def _delete_if_abandoned(self, part: os.DirEntry[str]) -> None:
        """Whoever fetches holds the shard's lock: a temporary file without a holder is a dead process's."""
        with open(self._lock_path(part.name), "a") as lock, suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(part.path)

    def _remember(self, url: str, error: SourceError) -> None:
        with self._mutex:
            self._failures.setdefault(url, (time.monotonic(), str(error)))

    def _raise_recent_failure(self, url: str) -> None:
        """Ten thousand samples of one missing shard must not each retry for a minute."""
        with self._mutex:
            failed_at, message = self._failures.get(url, (0.0, ""))
            if message and time.monotonic() - failed_at < _REMEMBER_FAILURE_S:
                raise SourceError(message)
            self._failures.pop(url, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start_empty()  # threads, locks and what failed do not travel to worker processes


def default_folder() -> Path:
    """`megavit-shards-UID` in the folder for temporary files ($TMPDIR), made for this user alone.

    SourceError if it cannot be made, or if what has that name is no folder of this user's own: whoever can
    write there chooses what is trained on.
    """
    folder = Path(tempfile.gettempdir()) / f"megavit-shards-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # not stat: a link may lead to somebody else's folder
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise SourceError(
                f"the default cache folder {folder} is a link, or not user {os.getuid()}'s own folder; "
                f"remove it, or choose another one with --data.cache_dir (--cache_dir of launch/shards.py)"
            )
        folder.chmod(0o700)
    except OSError as error:
        raise SourceError(
            f"the default cache folder {folder} cannot be used: {error.strerror}; choose another one with "
            f"--data.cache_dir (--cache_dir of launch/shards.py)"
        ) from error
    return folder


def _file_name(url: str) -> str:
    """Digest of the full url, then its last part so that people can read the folder."""
    last = url.partition("?")[0].rstrip("/").rpartition("/")[2]
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]+', '_', last)[-80:]}"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _is_permanent(error: Exception) -> bool:
    """Missing or forbidden: tried once more (a shard may just be appearing), not five times."""
    status = getattr(error, "status", None)  # aiohttp's ClientResponseError
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_4XX
    return refused or isinstance(error, (FileNotFoundError, PermissionError))
