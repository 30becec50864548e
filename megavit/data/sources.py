"""Where the bytes of a shard come from: what its url means, and how one try to fetch it goes.

Every scheme that fsspec or webdataset knows, and shell commands. Tries, checks of the length and the place on
disk are `cache.py`'s.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import fsspec
from fsspec.asyn import sync
from webdataset.gopen import gopen, gopen_schemes

# (url, file to write, timeout_s) -> length that the server announced
Fetch = Callable[[str, Path, float], int | None]


def gopen_fsspec(url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> IO[bytes]:
    """webdataset's way to open a url, through fsspec: a stream, without the retries of `ShardCache`."""
    return fsspec.open(url, mode, **options).open()


# Without these wds.WebDataset("s3://...") says "no gopen handler defined". A user's own handler stays.
for _scheme in ("s3", "s3a", "gcs", "az", "abfs"):
    gopen_schemes.setdefault(_scheme, gopen_fsspec)


class SourceError(ValueError):
    """A shard cannot be had; the message names its full url, the reason and the number of attempts."""


def is_local(url: str) -> bool:
    """Whether a shard is a file of this node: a plain path or `file:`. Everything with another scheme, and
    `pipe:`, is remote. A colon alone (`run:3/a.tar`) makes no scheme unless webdataset knows it."""
    return _scheme_of(url) in ("", "file")


def _scheme_of(url: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?", url)
    if match and (match[2] or match[1] == "file" or match[1] in gopen_schemes):
        return match[1]
    return ""


def local_path(url: str) -> Path:
    """The path that a local url, plain or `file:`, stands for."""
    return Path(url2pathname(urlparse(url).path) if _scheme_of(url) else url)


def is_command(url: str) -> bool:
    """Whether reading this url runs a shell command of its own choice."""
    return url.startswith("pipe:")


def open_regular(path: str | Path) -> int:
    """A read-only descriptor of a regular file. OSError if it cannot be opened, and for anything else: a
    device may never end, and opening a named pipe waits for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.open(path, os.O_RDONLY)


def fetcher(url: str) -> Fetch:
    """How to fetch a url. SourceError for an unknown scheme, a missing package, a pipe under WDS_SECURE."""
    scheme = _scheme_of(url)
    if is_command(url):
        if os.environ.get("WDS_SECURE", "") not in ("", "0"):
            raise SourceError(f"shard {url}: WDS_SECURE is set, and a pipe runs any shell command; not tried")
        return _fetch_pipe
    handler = gopen_schemes.get(scheme)
    users_own = getattr(handler, "__module__", None) not in (gopen.__module__, __name__)
    if handler and users_own:
        return _fetch_gopen
    known = fsspec.available_protocols()
    if scheme in known:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise SourceError(
                f"shard {url}: a package for {scheme}:// is missing, not tried: {error}"
            ) from error
        return _fetch_fsspec
    if handler:
        return _fetch_gopen
    names = ", ".join(sorted(set(known) | set(gopen_schemes) - {"__default__"}))
    raise SourceError(f"shard {url}: unknown scheme {scheme!r}, not tried; known are {names}")


def _fetch_fsspec(url: str, part: Path, timeout_s: float) -> int | None:
    filesystem, path = fsspec.url_to_fs(url, **_client_options(_scheme_of(url), timeout_s))
    progress = fsspec.Callback()
    if filesystem.async_impl:
        filesystem.retries = 1  # else s3fs and gcsfs make their own five or six tries inside each of ours
        sync(filesystem.loop, _get_watched, filesystem, path, part, progress, timeout_s)
    else:
        filesystem.get_file(path, str(part), callback=progress)
    return progress.size


async def _get_watched(
    filesystem: Any, path: str, part: Path, progress: fsspec.Callback, timeout_s: float
) -> None:
    """Give up when no byte arrives for `timeout_s`: the one time limit that all clients have in common."""
    task, before = asyncio.ensure_future(filesystem._get_file(path, str(part), callback=progress)), 0
    while not (await asyncio.wait({task}, timeout=timeout_s))[0]:
        if progress.value == before:
            task.cancel()
            raise TimeoutError(f"no byte for {timeout_s} s")
        before = progress.value
    task.result()


def _client_options(scheme: str, timeout_s: float) -> dict[str, Any]:
    """What the clients' defaults get wrong for large files. A user's fsspec configuration (FSSPEC_*) wins."""
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
            "trust_env": True,  # proxies and .netrc, as curl does
            # Bytes as stored: a transparent gzip would change the length under the check, and the shard.
            "auto_decompress": False,
            "headers": {"Accept-Encoding": "identity"},
        }
    elif scheme in ("s3", "s3a"):
        options["max_concurrency"] = (
            1  # several shards at a time anyway; parts of 50 MB would show no progress
        )
        options["config_kwargs"] = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
        }
    users = fsspec.config.apply_config(fsspec.get_filesystem_class(scheme), {})
    return {
        key: value | users.get(key, {}) if isinstance(value, dict) else users.get(key, value)
        for key, value in options.items()
    }


def _fetch_gopen(url: str, part: Path, _timeout_s: float) -> None:
    """Through a handler of webdataset's table, which has its own time limits (or none)."""
    with (
        closing(gopen(url, "rb")) as stream,
        open(part, "wb") as out,
    ):  # close() of a Pipe checks its exit status
        shutil.copyfileobj(stream, out)


def _fetch_pipe(url: str, part: Path, timeout_s: float) -> None:
    """Take the output of a shell command that ends with status 0, in all stages of a pipeline (with bash)."""
    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
    with open(part, "wb") as out, tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [*shell, url.removeprefix("pipe:")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,  # a process group of its own, to kill as a whole
        )
        assert process.stdout is not None
        poll = select.poll()  # select() fails from descriptor 1024 on
        poll.register(process.stdout, select.POLLIN)
        try:
            while poll.poll(timeout_s * 1000):
                chunk = os.read(process.stdout.fileno(), 1 << 20)
                if not chunk:
                    break
                out.write(chunk)
            else:
                raise TimeoutError(f"no byte for {timeout_s} s")
            process.wait(timeout_s)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the id is still its own
            raise
        finally:
            process.stdout.close()
            process.wait()
        if process.returncode:
            messages.seek(max(0, messages.seek(0, os.SEEK_END) - 300))
            said = messages.read().decode(errors="replace").strip()
            raise OSError(f"exit status {process.returncode}: {said}")
