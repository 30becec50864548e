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


def read_class_names(path: str | Path) -> list[str]:
    """The names in a text file, one a line. ValueError naming the file if it is no list of names."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; it must be a text file with one class name a line"
        ) from error
    names = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    if "\0" in text or not all(name.strip() for name in names):
        what = "it is no text" if "\0" in text else "a line is empty"
        raise ValueError(f"{path} must have one class name in every line, but {what}; repair it or remove it")
    return names


def class_names_file(shards: str, given: str = "") -> Path | None:
    """Where the names of a run's classes are: the file that is `given`, or the one in the folder of `shards`
    (a manifest, or a pattern of local files), or None if there is none."""
    beside = Path(shards).parent / CLASSES_FILE
    return Path(given) if given else beside if shards and beside.is_file() else None


def class_names_beside(shards: str) -> list[str]:
    """The names in the folder of `shards`, or an empty list if there are none. ValueError naming the file if
    it is no list of names."""
    path = class_names_file(shards)
    return read_class_names(path) if path else []


def class_names_of_run(run_dir: Path, shards: str, given: str, num_classes: int) -> list[str]:
    """The names of a run's classes: those in the file that is `given`, or those that its folder keeps, or
    those beside its shards if they are as many as the classes; else an empty list.

    ValueError naming the file if one that is given or kept has another number of names.
    """
    kept = run_dir / CLASSES_FILE
    if not given and not kept.exists():
        names = class_names_beside(shards)
        return names if len(names) == num_classes else []
    names = read_class_names(given or kept)
    if len(names) != num_classes:
        raise ValueError(
            f"{given or kept} has {len(names)} names, model.num_classes is {num_classes}; give a file with a "
            f"name for each class (--data.class_names FILE)"
        )
    return names
