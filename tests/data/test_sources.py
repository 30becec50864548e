"""Fetching shards over real HTTP, real S3 and real pipes, from servers that misbehave."""

from __future__ import annotations

import gzip
import importlib.util
import io
import multiprocessing
import os
import pickle
import random
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset as wds
from webdataset.gopen import gopen_schemes

from megavit.data.sources import ShardCache, SourceError, is_local

pytestmark = pytest.mark.slow  # real servers, time-outs and processes: about 45 s

BODY = random.Random(0).randbytes(1 << 20)
_context = multiprocessing.get_context("forkserver")


class _Handler(BaseHTTPRequestHandler):
    """Paths are /BEHAVIOUR/COUNT/anything: the first COUNT requests misbehave, the rest are served well."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        with self.server.mutex:
            self.server.requests.append(self.path)
            count = self.server.requests.count(self.path)
        behaviour, times = self.path.split("/")[1:3]
        if count > int(times):
            behaviour = "good"
        body = BODY[:1000] if behaviour == "short_unnoticed" else BODY
        if behaviour in ("404", "403", "503"):
            return self._answer(int(behaviour), 0)
        if behaviour == "hang":
            self.server.released.wait(30)
        if behaviour == "gzip":
            body = gzip.compress(BODY)
        self._answer(200, len(body), {"Content-Encoding": "gzip"} if behaviour == "gzip" else {})
        if behaviour == "slow":
            for i in range(0, len(body), 1 << 17):
                self.wfile.write(body[i : i + (1 << 17)])
                time.sleep(0.1)
        elif behaviour in ("drop", "short", "stall"):
            self.wfile.write(body[: len(body) // 2])
            if behaviour == "stall":
                self.server.released.wait(30)
            if behaviour == "drop":  # a reset, not an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _answer(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Counts requests by path."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mutex = threading.Lock()
        self.requests: list[str] = []
        self.released = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", max_bytes=100 << 20, tries=3, timeout_s=1)


def files(cache: ShardCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("a/b.tar", True),
        ("/data/run:3/a.tar", True),
        ("run:3/a.tar", True),
        ("file:/a.tar", True),
        ("file:///a.tar", True),
        ("http://h/a.tar", False),
        ("https://h/a.tar", False),
        ("s3://b/a.tar", False),
        ("gs://b/a.tar", False),
        ("pipe:cat a.tar", False),
        ("nosuch://a", False),
    ],
)
def test_local_and_remote_are_told_apart(url: str, local: bool) -> None:
    """Catches a path with a colon taken for a url, and a url looked for on disk."""
    assert is_local(url) is local


def test_local_shards_are_left_alone(tmp_path: Path, cache: ShardCache) -> None:
    """Catches copies of what lies on disk, `file:` urls passed on as paths, and missing files not named."""
    path = tmp_path / "a b.tar"
    path.write_bytes(BODY)
    assert cache.get(str(path)) == path
    assert cache.get(f"file://{tmp_path}/a%20b.tar", size=3) == path
    assert not cache.folder.exists()
    with os.fdopen(cache.open(path.as_uri()), "rb") as file:
        assert file.read() == BODY
    with pytest.raises(SourceError, match=r"nowhere\.tar: FileNotFoundError"):
        cache.open("nowhere.tar")


def test_shard_is_fetched_once_and_then_found(server: Server, cache: ShardCache) -> None:
    """Catches a second download of a cached shard, and temporary files that stay behind."""
    url = server.url("/good/0/a.tar?x=1")
    path = cache.get(url, len(BODY))
    assert path.read_bytes() == BODY
    assert path.name.endswith("-a.tar")
    assert cache.get(url) == path
    assert len(server.requests) == 1
    assert files(cache) == [path]


def test_stored_bytes_are_kept(server: Server, cache: ShardCache) -> None:
    """Catches a client that unpacks on the way: a file of neither the announced nor the indexed size."""
    assert gzip.decompress(cache.get(server.url("/gzip/1/a.tar")).read_bytes()) == BODY


@pytest.mark.parametrize("behaviour", ["503", "drop", "short", "hang", "stall", "short_unnoticed"])
def test_transient_failures_are_retried(server: Server, cache: ShardCache, behaviour: str) -> None:
    """Catches half a shard taken for a whole one, a hung server that stops training, and no second try."""
    path = cache.get(server.url(f"/{behaviour}/2/a.tar"), len(BODY))
    assert path.read_bytes() == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize("behaviour", ["503", "drop", "short", "404"])
def test_failures_are_noticed_without_a_known_size(server: Server, cache: ShardCache, behaviour: str) -> None:
    """Catches a check that works only for shards whose size the manifest tells."""
    assert cache.get(server.url(f"/{behaviour}/1/a.tar")).read_bytes() == BODY
    assert len(server.requests) == 2


def test_slow_is_not_hung(server: Server, tmp_path: Path) -> None:
    """Catches a time limit for the whole shard where one for standing still is meant."""
    cache = ShardCache(tmp_path, 10 << 20, tries=1, timeout_s=0.4)
    assert cache.get(server.url("/slow/1/a.tar")).read_bytes() == BODY


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
        cache.get(url, len(BODY))
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
        cache.get(url)
    started = time.monotonic()
    for _ in range(1000):
        with pytest.raises(SourceError) as again:
            cache.get(url)
    assert time.monotonic() - started < 0.5
    assert str(again.value) == str(first.value)
    assert len(server.requests) == 2
    with pytest.raises(SourceError):
        pickle.loads(pickle.dumps(cache)).get(url)  # a worker process starts afresh
    assert len(server.requests) == 4


def test_same_basename_is_another_shard(server: Server, cache: ShardCache) -> None:
    """Catches webdataset's cache, where /a/000.tar is served for /b/000.tar."""
    paths = {cache.get(server.url(f"/good/0/{folder}/000.tar")) for folder in "ab"}
    paths |= {cache.get(server.url(f"/good/0/a/000.tar?version={version}")) for version in (1, 2)}
    assert len(paths) == 4


def test_cached_file_of_another_size_is_fetched_again(server: Server, cache: ShardCache) -> None:
    """Catches training on a shard that was rewritten, or cut off by a full disk."""
    url = server.url("/good/0/a.tar")
    path = cache.get(url)
    path.write_bytes(b"old")
    assert cache.get(url, len(BODY)).read_bytes() == BODY
    assert len(server.requests) == 2


def test_disk_is_bounded(server: Server, tmp_path: Path) -> None:
    """Catches a disk that fills up, eviction of what is in use or new, and of somebody else's files."""
    cache = ShardCache(tmp_path, max_bytes=3 * len(BODY) + 10)
    (tmp_path / "thesis.tex").write_bytes(BODY * 4)
    paths = []
    for i in range(5):
        paths.append(cache.get(server.url(f"/good/0/{i}.tar"), len(BODY)))
        time.sleep(0.02)
        cache.get(server.url("/good/0/0.tar"))  # used all the time
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in files(cache) if path.suffix == ".tar") <= cache.max_bytes
    assert [path.exists() for path in paths] == [True, False, False, True, True]
    assert server.requests.count("/good/0/0.tar") == 1
    assert (tmp_path / "thesis.tex").exists()
    small = ShardCache(tmp_path, max_bytes=10)
    assert small.get(server.url("/good/0/big.tar")).read_bytes() == BODY
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
    assert [cache.get(url, len(BODY)).read_bytes() for url in urls] == [BODY] * 3
    with pytest.raises(SourceError, match="/404/99"):
        cache.get(missing)
    assert sorted(server.requests) == ["/404/99/a.tar"] * 2 + [f"/slow/1/{i}.tar" for i in range(3)]
    deadline = time.monotonic() + 5
    while cache._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cache._running == 0


def test_cache_travels_to_workers(server: Server, cache: ShardCache) -> None:
    """Catches threads and locks in the pickle of a dataset."""
    cache.prefetch([(server.url("/good/0/a.tar"), None)])
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(server.url("/good/0/a.tar")) == cache.get(server.url("/good/0/a.tar"))
    assert (copy.folder, copy.max_bytes, copy.tries) == (cache.folder, cache.max_bytes, cache.tries)
    assert len(server.requests) == 1


def _get(cache: ShardCache, url: str, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        results.put(cache.get(url).read_bytes() == BODY)  # type: ignore[attr-defined]
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
    path = cache.get(urls[0])
    assert path.read_bytes() == BODY
    assert files(cache) == [path]  # b's half is gone as well


def test_pipe_is_read(tmp_path: Path, cache: ShardCache) -> None:
    """Catches output lost at the end of a pipe, and a pipeline run without a shell."""
    (tmp_path / "a.tar").write_bytes(BODY)
    url = f"pipe:cat {shlex.quote(str(tmp_path / 'a.tar'))} | cat"
    assert cache.get(url, len(BODY)).read_bytes() == BODY


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {}; echo went wrong >&2; exit 1", "exit status 1: went wrong"),
        ("(cat {}; exit 7) | cat", "exit status 7"),
        ("cat {}; kill -9 $$", "exit status -9"),
        ("cat {}; sleep 61; true", "no byte for"),
        ("cat {}; exec >&-; sleep 62; true", "timed out"),
    ],
)
def test_failing_pipe_is_no_shard(tmp_path: Path, command: str, reason: str) -> None:
    """Catches webdataset's silence about commands that fail after the last byte, and ones left running."""
    (tmp_path / "a.tar").write_bytes(BODY)
    cache = ShardCache(tmp_path / "cache", 10 << 20, tries=2, timeout_s=0.3)
    with pytest.raises(SourceError, match=reason):
        cache.get("pipe:" + command.format(tmp_path / "a.tar"))
    assert files(cache) == []
    deadline = time.monotonic() + 2
    while {"sleep 61", "sleep 62"} & set(
        subprocess.check_output(["ps", "-eo", "args"], text=True).split("\n")
    ):
        assert time.monotonic() < deadline, "left running"


def test_pipes_are_refused_under_wds_secure(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a manifest that runs commands although webdataset was told to be secure."""
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(SourceError, match="WDS_SECURE"):
        cache.get("pipe:echo")


def test_unknown_scheme_is_named(cache: ShardCache) -> None:
    """Catches a typing error that is retried for a minute and then says nothing useful."""
    with pytest.raises(SourceError, match=r"s4://b/a\.tar: unknown scheme 's4'.* https.* s3,"):
        cache.get("s4://b/a.tar")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_missing_package_is_named(cache: ShardCache) -> None:
    """Catches an ImportError from deep inside that does not say what to install."""
    with pytest.raises(SourceError, match="gs://b/a.tar.*gcsfs"):
        cache.get("gs://b/a.tar")


def test_users_own_scheme_is_used(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches handlers that users registered with webdataset and that only plain webdataset would see."""
    monkeypatch.setitem(gopen_schemes, "mine", lambda url, mode, bufsize: io.BytesIO(url.encode() + BODY))
    assert cache.get("mine://x").read_bytes() == b"mine://x" + BODY


def test_full_disk_is_explained(server: Server, tmp_path: Path) -> None:
    """Catches a bare "No space left on device" from a worker, or five tries against a full disk."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("no user namespaces here")
    urls = [server.url("/good/0/a.tar"), "pipe:cat /dev/zero"]
    code = f"""
from megavit.data.sources import ShardCache, SourceError
for url in {urls}:
    try:
        ShardCache({str(small)!r}, 1 << 30).get(url)
    except SourceError as error:
        print(error)
"""
    script = f"mount -t tmpfs -o size=512k tmpfs {small} && {shlex.join([sys.executable, '-c', code])}"
    said = subprocess.check_output(["unshare", "-Urm", "sh", "-c", script], text=True)
    for url in urls:
        assert f"shard {url}: OSError: [Errno 28]" in said
    assert said.count(f"the disk of {small} is full: free some, or lower --data.cache_gb") == 2
    assert len(server.requests) == 1


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server with s3://shards/train/a.tar (three samples), which the environment names; its endpoint."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    environment = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        environment.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    client.put_object(Bucket="shards", Key="train/a.tar", Body=_small_tar())
    yield f"http://{host}:{port}"
    environment.undo()
    moto.stop()


def _small_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(str(i).encode()))
    return buffer.getvalue()


@pytest.mark.usefixtures("s3")
def test_s3_is_read(tmp_path: Path) -> None:
    """Catches an endpoint in the environment that is not honoured, and s3 errors not understood."""
    data = _small_tar()
    cache = ShardCache(tmp_path, 10 << 20, tries=3)
    assert cache.get("s3://shards/train/a.tar", len(data)).read_bytes() == data
    with pytest.raises(SourceError, match=r"in 2 tries.*FileNotFoundError"):
        cache.get("s3://shards/train/none.tar")
    with pytest.raises(SourceError, match="received 10240 bytes instead of 5"):
        cache.get("s3://shards/train/a.tar", 5)


@pytest.mark.usefixtures("s3")
def test_plain_webdataset_reads_s3() -> None:
    """Catches wds.WebDataset("s3://...") without a handler."""
    samples = list(wds.WebDataset("s3://shards/train/a.tar", shardshuffle=False))
    assert [sample["cls"] for sample in samples] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("behaviour", ["hang", "drop", "503"])
def test_s3_is_tried_as_often_as_http(
    server: Server, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """Catches botocore's and s3fs's own retries inside each try: half an hour where five minutes were
    meant."""
    import fsspec

    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": server.url(f"/{behaviour}/99"), "key": "k", "secret": "s"}
    )
    started = time.monotonic()
    with pytest.raises(SourceError, match="in 3 tries"):
        cache.get("s3://shards/a.tar")
    assert time.monotonic() - started < 10
    assert len(server.requests) == 3
