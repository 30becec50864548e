"""Fetching shards once, whole and into a bounded folder, from a server that misbehaves."""

from __future__ import annotations

import dataclasses
import gzip
import multiprocessing
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megavit.data.audit import verify
from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.manifest import index_pattern, open_shards, read_manifest
from megavit.data.reader import ShardReader
from megavit.data.sources import SourceError
from megavit.data.tar import ShardError
from tests.data.shards import cache_in, fetched, flip_bit, folder_server, picture, write_shards
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
    if behaviour in ("hang", "stall"):
        cache.timeout_s = 2  # both wait for it, twice; the answer after that must not need it
    assert fetched(cache, server.url(f"/{behaviour}/2/a.tar"), len(BODY)) == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("behaviour", ["503", "drop", "short", "404"])
def test_failures_are_noticed_without_a_known_size(server: Server, cache: ShardCache, behaviour: str) -> None:
    """Catches a check that works only for shards whose size the manifest tells."""
    assert fetched(cache, server.url(f"/{behaviour}/1/a.tar")) == BODY
    assert len(server.requests) == 2


def test_slow_is_not_hung(server: Server, tmp_path: Path) -> None:
    """Catches a time limit for the whole shard where one for standing still is meant."""
    cache = ShardCache(tmp_path, 10 << 20, attempts=1, timeout_s=1.5)  # it takes two seconds
    assert fetched(cache, server.url("/slow/1/a.tar")) == BODY


@pytest.mark.parametrize(
    ("behaviour", "reason", "attempts"),
    [
        ("404", "FileNotFoundError", 2),
        ("403", "403", 2),
        ("503", "503", 3),
        ("drop", "Error", 3),
        ("short_unnoticed", f"received 1000 bytes instead of {len(BODY)}", 3),
    ],
)
def test_lasting_failures_name_url_reason_and_attempts(
    server: Server, cache: ShardCache, behaviour: str, reason: str, attempts: int
) -> None:
    """Catches endless retries, five attempts of a shard that does not exist, and errors nobody can act on."""
    url = server.url(f"/{behaviour}/99/a.tar")
    with pytest.raises(SourceError) as caught:
        fetched(cache, url, len(BODY))
    assert url in str(caught.value)
    assert reason in str(caught.value)
    assert f"in {attempts} attempts" in str(caught.value)
    assert len(server.requests) == attempts
    assert files(cache) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_failed_shard_is_remembered(server: Server, cache: ShardCache) -> None:
    """Catches every sample of a missing shard waiting for its own retries."""
    url = server.url("/404/99/a.tar")
    with pytest.raises(SourceError) as first:
        fetched(cache, url)
    asked = len(server.requests)
    for _ in range(1000):
        with pytest.raises(SourceError) as again:
            fetched(cache, url)
    assert len(server.requests) == asked
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
    """Catches a shard fetched by the prefetch and by its reader, and a prefetch that raises."""
    urls = [server.url(f"/slow/1/{i}.tar") for i in range(3)]
    missing = server.url("/404/99/a.tar")
    cache.prefetch([(url, len(BODY)) for url in [*urls, *urls]] + [("/local.tar", 1), (missing, None)])
    assert [fetched(cache, url, len(BODY)) for url in urls] == [BODY] * 3
    with pytest.raises(SourceError, match="/404/99"):
        fetched(cache, missing)
    assert sorted(server.requests) == ["/404/99/a.tar"] * 2 + [f"/slow/1/{i}.tar" for i in range(3)]
    deadline = time.monotonic() + 60
    while cache._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cache._running == 0


def test_cache_travels_to_workers(server: Server, cache: ShardCache) -> None:
    """Catches threads and locks in the pickle of a dataset."""
    cache.prefetch([(server.url("/good/0/a.tar"), None)])
    copy = pickle.loads(pickle.dumps(cache))
    assert fetched(copy, server.url("/good/0/a.tar")) == fetched(cache, server.url("/good/0/a.tar"))
    assert (copy.folder, copy.max_bytes, copy.attempts) == (cache.folder, cache.max_bytes, cache.attempts)
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


def _open_and_read(pattern: str, cache: ShardCache, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        for _ in range(2):
            manifest = open_shards(pattern, cache)
            reader = ShardReader(manifest, cache)
            reader.fetch(range(len(manifest)))
            for shard in range(len(manifest)):
                (image,) = reader.read(shard, 1, [reader.members(shard, 1)["png"]])
                assert image == picture(8 * shard + 1)
            reader.close()
        results.put("")  # type: ignore[attr-defined]
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")  # type: ignore[attr-defined]


@pytest.mark.dist
def test_a_cache_smaller_than_two_shards_is_slow_and_right(tmp_path: Path) -> None:
    """Catches a path of a shard that other threads and processes have evicted before it is opened."""
    size = int(write_shards(tmp_path / "data", shards=5, samples=8, indexed=False).shard_bytes[0])
    cache = ShardCache(tmp_path / "cache", size * 3 // 2)
    barrier, results = _context.Barrier(3), _context.Queue()
    with folder_server(tmp_path / "data") as url:
        pattern = f"{url}/x-{{000..004}}.tar"
        processes = [
            _context.Process(target=_open_and_read, args=(pattern, cache, barrier, results)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        assert [results.get(timeout=120) for _ in processes] == [""] * 3
        for process in processes:
            process.join(10)
        assert sum(path.stat().st_size for path in files(cache)) <= max(cache.max_bytes, size)
        assert not list(verify(index_pattern(pattern, tmp_path / "index", 1, cache), cache, 1))


def test_what_is_fetched_and_held_open_is_not_fetched_again(tmp_path: Path) -> None:
    """Catches a shard that is downloaded for every batch because the cache is too small for it."""
    write_shards(tmp_path / "data", shards=4, samples=4)
    local = read_manifest(tmp_path / "data" / "x.manifest.json")
    with folder_server(tmp_path / "data") as url:
        urls = tuple(f"{url}/{Path(path).name}" for path in local.urls)
        reader = ShardReader(dataclasses.replace(local, urls=urls), ShardCache(tmp_path / "cache", 10))
        reader.fetch({0, 1, 2, 3})
    for _ in range(3):  # the server is gone
        reader.fetch({0, 1, 2, 3})
        for shard in range(4):
            assert reader.read(shard, 2, [reader.members(shard, 2)["png"]]) == [picture(4 * shard + 2)]


def test_what_is_no_shard_does_not_stay(tmp_path: Path) -> None:
    """Catches a login page, sent with status 200, that is found in the cache for ever."""
    write_shards(tmp_path / "data", shards=1, samples=4, indexed=False)
    good = (tmp_path / "data" / "x-000.tar").read_bytes()
    (tmp_path / "data" / "x-000.tar").write_bytes(b"<!DOCTYPE html><title>Log in</title>" * 40)
    cache = cache_in(tmp_path)
    with folder_server(tmp_path / "data") as url:
        words = (
            rf"x-000\.tar is damaged.*begins with b'<!DOCTYPE html>.*{cache.place(url + '/x-000.tar')}, now"
        )
        for _ in range(2):
            with pytest.raises(ShardError, match=words):
                open_shards(f"{url}/x-000.tar", cache)
            with pytest.raises(ShardError, match=words):
                index_pattern(f"{url}/x-000.tar", tmp_path / "index", 1, cache)
            assert files(cache) == []
        (tmp_path / "data" / "x-000.tar").write_bytes(good)
        assert open_shards(f"{url}/x-000.tar", cache).num_samples == 4


def test_damage_in_a_fetched_copy_names_the_copy(tmp_path: Path) -> None:
    """Catches a search for damage in a shard that is good: only its copy on this node is not."""
    write_shards(tmp_path / "data", shards=1, samples=4)
    cache = cache_in(tmp_path)
    with folder_server(tmp_path / "data") as url:
        manifest = index_pattern(f"{url}/x-000.tar", tmp_path / "index", 1, cache)
    copy = cache.place(manifest.urls[0])
    flip_bit(copy, manifest.index(0).sample(1)["png"].offset + 30)
    (line,) = verify(manifest, cache, 1)
    assert (
        f"x-000.tar: sample '000001': the checksum of its png differs: it is damaged (in the copy {copy})"
        in line
    )


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, as $TMPDIR names it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # where the first answer is kept
    return tmp_path / f"megavit-shards-{os.getuid()}"


def test_the_default_folder_is_the_users_own(temporary: Path) -> None:
    """Catches a folder that all users of a machine share: one fills it, another chooses the images."""
    before = os.umask(0)
    try:
        cache = ShardCache("", 10)
        assert cache.folder == temporary and temporary.stat().st_mode & 0o777 == 0o700
        temporary.chmod(0o755)
        assert ShardCache("", 10).folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert pickle.loads(pickle.dumps(cache)).folder == temporary
    assert DataConfig().cache_dir == ""  # what a run folder records fits every machine


@pytest.mark.parametrize("kind", ["link", "file", "owner"])
def test_a_default_folder_of_somebody_else_is_refused(temporary: Path, kind: str) -> None:
    """Catches shards read from where another user has put them before."""
    if kind == "link":
        (temporary.parent / "elsewhere").mkdir()
        temporary.symlink_to(temporary.parent / "elsewhere")
    elif kind == "file":
        temporary.write_text("")
    elif os.getuid():
        pytest.skip("only root can give a folder away")
    else:
        temporary.mkdir()
        os.chown(temporary, 12345, 12345)
    with pytest.raises(SourceError, match=rf"default cache folder {temporary} .*--data\.cache_dir"):
        ShardCache("", 10)


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
    """Catches a bare "No space left on device" from a worker, or five attempts against a full disk."""
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
