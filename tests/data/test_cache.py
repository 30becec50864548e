"""Fetching shards once, whole and into a bounded folder, from a server that misbehaves."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavit.data.cache import ShardCache
from megavit.data.sources import SourceError
from tests.data.shards import fetched
from tests.lab.shard_server import BODY, Server

pytestmark = pytest.mark.slow  # real servers, time-outs and processes

_context = multiprocessing.get_context("forkserver")


def files(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_file())


def test_local_shards_are_left_alone(tmp_path: Path, cache: ShardCache) -> None:
    """Catches copies of what lies on disk, `file:` urls passed on as paths, and missing files not named."""
    path = tmp_path / "a b.tar"
    path.write_bytes(BODY)
    for url in (str(path), f"file://{tmp_path}/a%20b.tar"):
        assert fetched(cache, url, size=3) == BODY
    assert not cache.folder.exists()
    with pytest.raises(SourceError, match=r"nowhere\.tar: FileNotFoundError"):
        cache.open("nowhere.tar")


def test_shard_is_fetched_once_and_then_found(server: Server, cache: ShardCache) -> None:
    """Catches a second download of a cached shard, and temporary files that stay behind."""
    url = server.url("/good/0/a.tar?x=1")
    assert fetched(cache, url, len(BODY)) == BODY
    assert cache.place(url).name.endswith("-a.tar")
    assert fetched(cache, url) == BODY
    assert len(server.requests) == 1
    assert files(cache) == [cache.place(url)]


def test_stored_bytes_are_kept(server: Server, cache: ShardCache) -> None:
    """Catches a client that unpacks on the way: a file of neither the announced nor the indexed size."""
    assert gzip.decompress(fetched(cache, server.url("/gzip/1/a.tar"))) == BODY


@pytest.mark.parametrize("behaviour", ["503", "drop", "short", "hang", "stall", "short_unnoticed"])
def test_transient_failures_are_retried(server: Server, cache: ShardCache, behaviour: str) -> None:
    """Catches half a shard taken for a whole one, a hung server that stops training, and no second try."""
    assert fetched(cache, server.url(f"/{behaviour}/2/a.tar"), len(BODY)) == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("behaviour", ["503", "drop", "short", "404"])
def test_failures_are_noticed_without_a_known_size(server: Server, cache: ShardCache, behaviour: str) -> None:
    """Catches a check that works only for shards whose size the manifest tells."""
    assert fetched(cache, server.url(f"/{behaviour}/1/a.tar")) == BODY
    assert len(server.requests) == 2


def test_slow_is_not_hung(server: Server, tmp_path: Path) -> None:
    """Catches a time limit for the whole shard where one for standing still is meant."""
    cache = ShardCache(tmp_path, 10 << 20, tries=1, timeout_s=0.4)
    assert fetched(cache, server.url("/slow/1/a.tar")) == BODY


@pytest.mark.parametrize(
    ("behaviour", "reason", "tries"),
    [
        ("404", "FileNotFoundError", 2),
        ("403", "403", 2),
        ("503", "503", 3),
        ("drop", "Error", 3),
        ("short_unnoticed", f"received 1000 bytes instead of {len(BODY)}", 3),
    ],
)
def test_lasting_failures_name_url_reason_and_tries(
    server: Server, cache: ShardCache, behaviour: str, reason: str, tries: int
) -> None:
    """Catches endless retries, five tries of a shard that does not exist, and errors nobody can act on."""
    url = server.url(f"/{behaviour}/99/a.tar")
    with pytest.raises(SourceError) as caught:
        fetched(cache, url, len(BODY))
    assert url in str(caught.value)
    assert reason in str(caught.value)
    assert f"in {tries} tries" in str(caught.value)
    assert len(server.requests) == tries
    assert files(cache) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_failed_shard_is_remembered(server: Server, cache: ShardCache) -> None:
    """Catches every sample of a missing shard waiting for its own retries."""
    url = server.url("/404/99/a.tar")
    with pytest.raises(SourceError) as first:
        fetched(cache, url)
    started = time.monotonic()
    for _ in range(1000):
        with pytest.raises(SourceError) as again:
            fetched(cache, url)
    assert time.monotonic() - started < 0.5
    assert str(again.value) == str(first.value)
    assert len(server.requests) == 2
    with pytest.raises(SourceError):
        fetched(pickle.loads(pickle.dumps(cache)), url)  # a worker process starts afresh
    assert len(server.requests) == 4


def test_same_basename_is_another_shard(server: Server, cache: ShardCache) -> None:
    """Catches webdataset's cache, where /a/000.tar is served for /b/000.tar."""
    names = ("a/000.tar", "b/000.tar", "a/000.tar?version=1", "a/000.tar?version=2")
    for name in names:
        assert fetched(cache, server.url(f"/good/0/{name}")) == BODY
    assert files(cache) == sorted(cache.place(server.url(f"/good/0/{name}")) for name in names)
    assert len(server.requests) == 4


def test_cached_file_of_another_size_is_fetched_again(server: Server, cache: ShardCache) -> None:
    """Catches training on a shard that was rewritten, or cut off by a full disk."""
    url = server.url("/good/0/a.tar")
    fetched(cache, url)
    cache.place(url).write_bytes(b"old")
    assert fetched(cache, url, len(BODY)) == BODY
    assert len(server.requests) == 2


def test_disk_is_bounded(server: Server, tmp_path: Path) -> None:
    """Catches a disk that fills up, eviction of what is in use or new, and of somebody else's files."""
    cache = ShardCache(tmp_path, max_bytes=3 * len(BODY) + 10)
    (tmp_path / "thesis.tex").write_bytes(BODY * 4)
    paths = []
    for i in range(5):
        url = server.url(f"/good/0/{i}.tar")
        fetched(cache, url, len(BODY))
        paths.append(cache.place(url))
        time.sleep(0.02)
        fetched(cache, server.url("/good/0/0.tar"))  # used all the time
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in files(cache) if path.suffix == ".tar") <= cache.max_bytes
    assert [path.exists() for path in paths] == [True, False, False, True, True]
    assert server.requests.count("/good/0/0.tar") == 1
    assert (tmp_path / "thesis.tex").exists()
    small = ShardCache(tmp_path, max_bytes=10)
    assert fetched(small, server.url("/good/0/big.tar")) == BODY
    assert not paths[0].exists()


def test_open_file_survives_its_eviction(server: Server, tmp_path: Path) -> None:
    """Catches a race between finding a shard and opening it, and reads that fail after an eviction."""
    cache = ShardCache(tmp_path, max_bytes=10)
    descriptors = [cache.open(server.url(f"/good/0/{i}.tar")) for i in range(4)]
    assert len(files(cache)) == 1
    for descriptor in descriptors:
        assert os.pread(descriptor, len(BODY) + 1, 0) == BODY
        os.close(descriptor)


def test_prefetch_and_get_fetch_once(server: Server, cache: ShardCache) -> None:
    """Catches a shard fetched by the prefetch and by its reader, and a prefetch that raises or waits."""
    urls = [server.url(f"/slow/1/{i}.tar") for i in range(3)]
    missing = server.url("/404/99/a.tar")
    started = time.monotonic()
    cache.prefetch([(url, len(BODY)) for url in [*urls, *urls]] + [("/local.tar", 1), (missing, None)])
    assert time.monotonic() - started < 0.2
    assert [fetched(cache, url, len(BODY)) for url in urls] == [BODY] * 3
    with pytest.raises(SourceError, match="/404/99"):
        fetched(cache, missing)
    assert sorted(server.requests) == ["/404/99/a.tar"] * 2 + [f"/slow/1/{i}.tar" for i in range(3)]
    deadline = time.monotonic() + 5
    while cache._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cache._running == 0


def test_cache_travels_to_workers(server: Server, cache: ShardCache) -> None:
    """Catches threads and locks in the pickle of a dataset."""
    cache.prefetch([(server.url("/good/0/a.tar"), None)])
    copy = pickle.loads(pickle.dumps(cache))
    assert fetched(copy, server.url("/good/0/a.tar")) == fetched(cache, server.url("/good/0/a.tar"))
    assert (copy.folder, copy.max_bytes, copy.tries) == (cache.folder, cache.max_bytes, cache.tries)
    assert len(server.requests) == 1


def _get(cache: ShardCache, url: str, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        results.put(fetched(cache, url) == BODY)  # type: ignore[attr-defined]
    except SourceError as error:
        results.put(error)  # type: ignore[attr-defined]


def get_in_processes(count: int, cache: ShardCache, url: str) -> list[object]:
    barrier, results = _context.Barrier(count), _context.Queue()
    processes = [_context.Process(target=_get, args=(cache, url, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    return found


@pytest.mark.dist
def test_processes_share_one_download(server: Server, cache: ShardCache) -> None:
    """Catches eight workers of a node that download the same shard eight times."""
    assert get_in_processes(4, cache, server.url("/slow/1/a.tar")) == [True] * 4
    assert len(server.requests) == 1


@pytest.mark.dist
def test_processes_share_one_failure(server: Server, cache: ShardCache) -> None:
    """Catches processes that try a dead url one after the other, each for its full time."""
    found = get_in_processes(3, cache, server.url("/503/99/a.tar"))
    assert all("503" in str(error) for error in found)
    assert len(server.requests) == 3


@pytest.mark.dist
def test_killed_process_holds_nobody_up(server: Server, cache: ShardCache) -> None:
    """Catches locks and temporary files that outlive the process which was fetching."""
    barrier, results = _context.Barrier(2), _context.Queue()
    urls = [server.url("/stall/1/a.tar"), server.url("/stall/1/b.tar")]
    patient = ShardCache(cache.folder, cache.max_bytes, timeout_s=60)
    processes = [_context.Process(target=_get, args=(patient, url, barrier, results)) for url in urls]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while not cache.folder.exists() or [path.stat().st_size > 0 for path in files(cache)] != [True, True]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert [path.suffix for path in files(cache)] == [".part", ".part"]
    assert fetched(cache, urls[0]) == BODY
    assert files(cache) == [cache.place(urls[0])]  # b's half is gone as well


def test_full_disk_is_explained(server: Server, tmp_path: Path) -> None:
    """Catches a bare "No space left on device" from a worker, or five tries against a full disk."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("no user namespaces here")
    urls = [server.url("/good/0/a.tar"), "pipe:cat /dev/zero"]
    code = f"""
from megavit.data.cache import ShardCache
from megavit.data.sources import SourceError
for url in {urls}:
    try:
        ShardCache({str(small)!r}, 1 << 30).open(url)
    except SourceError as error:
        print(error)
"""
    script = f"mount -t tmpfs -o size=512k tmpfs {small} && {shlex.join([sys.executable, '-c', code])}"
    said = subprocess.check_output(["unshare", "-Urm", "sh", "-c", script], text=True)
    for url in urls:
        assert f"shard {url}: OSError: [Errno 28]" in said
    assert said.count(f"the disk of {small} is full: free some, or lower --data.cache_gb") == 2
    assert len(server.requests) == 1
