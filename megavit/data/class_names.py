"""The names of the classes: a file `classes.txt` beside the shards, one name a line, in the order of the
class ids. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CLASSES_FILE = "classes.txt"


def write_class_names(folder: str | Path, names: Sequence[str]) -> None:
    """Write `folder/classes.txt`."""
    text = "".join(f"{name}\n" for name in names)
    # Names of folders may hold bytes that are not UTF-8.
    (Path(folder) / CLASSES_FILE).write_text(text, encoding="utf-8", errors="surrogateescape")


def class_names_beside(shards: str) -> list[str]:
    """The names in the folder of `shards` (a manifest, or a pattern of local files), or an empty list if
    there are none. ValueError naming the file if it is no list of names."""
    path = Path(shards).parent / CLASSES_FILE
    if not shards or not path.is_file():
        return []
    try:
        names = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not all(name.strip() for name in names):
        raise ValueError(
            f"{path} must have one class name in every line, but a line is empty; repair it or remove it"
        )
    return names
