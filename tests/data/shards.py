"""Small real shards for the tests, and ways of damaging them."""

from __future__ import annotations

import fcntl
import functools
import http.server
import io
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from megavit.data.cache import ShardCache
from megavit.data.config import DataConfig
from megavit.data.fields import Field, Labels, Picture
from megavit.data.manifest import Manifest, open_shards, write_index
from megavit.model.config import ModelConfig


def picture(i: int, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    """A grey image that `i` and nothing else determines."""
    pixels = np.random.default_rng(i).integers(0, 256, size[::-1], dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def labelled(model: ModelConfig, data: DataConfig, allow_none: bool = True) -> list[Field]:
    """The fields of a classification run."""
    image = Picture(
        size=model.image_size,
        channels=model.channels,
        antialias=data.antialias,
        decoder=data.decoder,
        max_pixels=data.max_pixels,
    )
    return [
        image,
        Labels(num_classes=model.num_classes, max_labels=data.max_labels, allow_none=allow_none),
    ]


def write_shards(
    folder: Path, shards: int = 6, samples: int = 40, *, labels: str = "cls", indexed: bool = True
) -> Manifest:
    """`folder/x-<number>.tar` of 8x8 PNGs, keys `<number>`, labels i % 10 (or two of them as json), and a
    manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"x-{shard:03}.tar"
        with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
            for i in range(shard * samples, (shard + 1) * samples):
                label = str(i % 10) if labels == "cls" else json.dumps({"labels": [i % 10, (i + 3) % 10]})
                tar.write({"__key__": f"{i:06}", "png": picture(i), labels: label.encode()})
        if indexed:
            write_index(path, f"{path}.idx")
    manifest = open_shards(f"{folder}/x-*.tar")
    if indexed:
        manifest.save(folder / "x.manifest.json")
    return manifest


@contextmanager
def reading_hangs(paths: Iterable[Path]) -> Iterator[None]:
    """Whoever opens one of the files waits, as for a file server that is gone: for up to 45 s the kernel lets
    this process keep its lease on them."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's request to give it up
    with ExitStack() as files:
        for path in paths:
            fcntl.fcntl(files.enter_context(open(path, "r+b")), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    signal.signal(signal.SIGIO, before)


def cache_in(folder: Path, max_bytes: int = 10**9) -> ShardCache:
    return ShardCache(folder / "cache", max_bytes)


def fetched(cache: ShardCache, url: str, size: int | None = None) -> bytes:
    """A shard's bytes, through the cache."""
    with os.fdopen(cache.open(url, size), "rb") as file:
        return file.read()


@contextmanager
def folder_server(folder: Path) -> Iterator[str]:
    """The url at which the files of a folder are served."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
