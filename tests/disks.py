"""Disks that are full: small file systems in memory, which only root can mount."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """`folder` on a file system of its own that holds no more than `size`."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Any) -> None:
    """Write until the disk is full."""
    for size in (1 << 20, 1 << 12, 1):
        for _ in itertools.count():
            try:
                if file.write(b"x" * size) < size:
                    break
            except OSError:
                break
