"""Shards behind real S3, real pipes and urls of all kinds."""

from __future__ import annotations

import importlib.util
import io
import shlex
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset as wds
from webdataset.gopen import gopen_schemes

from megavit.data.cache import ShardCache
from megavit.data.sources import SourceError, is_local
from tests.data.shards import fetched
from tests.lab.shard_server import BODY, Server

pytestmark = pytest.mark.slow  # real servers and time-outs


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


def test_pipe_is_read(tmp_path: Path, cache: ShardCache) -> None:
    """Catches output lost at the end of a pipe, and a pipeline run without a shell."""
    (tmp_path / "a.tar").write_bytes(BODY)
    url = f"pipe:cat {shlex.quote(str(tmp_path / 'a.tar'))} | cat"
    assert fetched(cache, url, len(BODY)) == BODY


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
    cache = ShardCache(tmp_path / "cache", 10 << 20, attempts=2, timeout_s=1 if "sleep" in command else 30)
    with pytest.raises(SourceError, match=reason):
        fetched(cache, "pipe:" + command.format(tmp_path / "a.tar"))
    assert not any(path.is_file() for path in cache.folder.iterdir())
    deadline = time.monotonic() + 60
    while {"sleep 61", "sleep 62"} & set(
        subprocess.check_output(["ps", "-eo", "args"], text=True).split("\n")
    ):
        assert time.monotonic() < deadline, "left running"


def test_pipes_are_refused_under_wds_secure(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a manifest that runs commands although webdataset was told to be secure."""
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(SourceError, match="WDS_SECURE"):
        fetched(cache, "pipe:echo")


def test_unknown_scheme_is_named(cache: ShardCache) -> None:
    """Catches a typing error that is retried for a minute and then says nothing useful."""
    with pytest.raises(SourceError, match=r"s4://b/a\.tar: unknown scheme 's4'.* https.* s3,"):
        fetched(cache, "s4://b/a.tar")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_missing_package_is_named(cache: ShardCache) -> None:
    """Catches an ImportError from deep inside that does not say what to install."""
    with pytest.raises(SourceError, match="gs://b/a.tar.*gcsfs"):
        fetched(cache, "gs://b/a.tar")


def test_users_own_scheme_is_used(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches handlers that users registered with webdataset and that only plain webdataset would see."""
    monkeypatch.setitem(gopen_schemes, "mine", lambda url, mode, bufsize: io.BytesIO(url.encode() + BODY))
    assert fetched(cache, "mine://x") == b"mine://x" + BODY


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
    cache = ShardCache(tmp_path, 10 << 20, attempts=3)
    assert fetched(cache, "s3://shards/train/a.tar", len(data)) == data
    with pytest.raises(SourceError, match=r"in 2 attempts.*FileNotFoundError"):
        fetched(cache, "s3://shards/train/none.tar")
    with pytest.raises(SourceError, match="received 10240 bytes instead of 5"):
        fetched(cache, "s3://shards/train/a.tar", 5)


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
    cache.timeout_s = 1 if behaviour == "hang" else 60
    with pytest.raises(SourceError, match="in 3 attempts"):
        fetched(cache, "s3://shards/a.tar")
    # On a loaded machine a try can be over before its request is sent: what hangs may have asked less often.
    assert len(server.requests) == 3 or (behaviour == "hang" and len(server.requests) < 3)
