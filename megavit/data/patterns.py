"""Which shards a pattern means."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable

import braceexpand

from megavit.data.sources import is_command, is_local, local_path
from megavit.data.tar import ShardError


def expand_shards(pattern: str) -> list[str]:
    """Urls of a pattern with braces (`{000..009}`) and, for local paths, wildcards (`*`), in order.

    ShardError if a local shard does not exist or is no regular file; folders that wildcards meet are passed
    over.
    """
    if not pattern:
        raise ShardError("no shards are named: the pattern is empty")
    urls: list[str] = []
    for part in [pattern] if is_command(pattern) and "{" not in pattern else _braces(pattern):
        if not is_local(part):
            urls.append(part)
            continue
        part = str(local_path(part))
        found = [part]
        if glob.has_magic(part):
            found = sorted(path for path in glob.glob(part) if not os.path.isdir(path))
        for path in found or [part]:
            if not os.path.exists(path):
                raise ShardError(
                    f"shard {path} does not exist (from {pattern!r}); write it with launch/shards.py, or "
                    f"name a manifest, with which missing shards are counted"
                )
            if not os.path.isfile(path):
                raise ShardError(f"shard {path} is not a regular file (from {pattern!r})")
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
