"""Where a data set comes from, and what is said if it is not there; walking folders of images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megavit.data.index import IMAGE_EXTENSIONS
from megavit.data.json_data import parse_json
from megavit.evaluate.sets.image_set import MissingData


@dataclass(frozen=True)
class Origin:
    """Facts about a data set.

    Args:
        title: its name in sentences.
        layout: what is expected below the data root, line by line.
        source: where it is to be had, an address.
        terms: what is asked for it: a licence, a registration.
        size: of what is downloaded, in words.
        images: how many images the published splits have.
    """

    title: str
    layout: str
    source: str
    terms: str
    size: str
    images: Mapping[str, int]

    def missing(self, path: str | Path, what: str = "does not exist") -> MissingData:
        """The error for a path that is not there."""
        layout = "".join(f"\n    {line}" for line in self.layout.splitlines())
        return MissingData(
            f"{self.title}: {path} {what}. Expected below the data root:{layout}\n"
            f"It is to be had from {self.source} ({self.terms}), {self.size}"
        )

    def folder(self, root: str | Path, *names: str) -> Path:
        """The first of `root/<name>` that is a folder, or `root` itself if it is called as one of them."""
        root = Path(root)
        for name in names:
            if (root / name).is_dir():
                return root / name
        if root.is_dir() and root.resolve().name in names:
            return root
        raise self.missing(root / names[0])

    def file(self, *places: Path) -> Path:
        """The first of the places that is a file."""
        for place in places:
            if place.is_file():
                return place
        raise self.missing(places[0])

    def read_json(self, path: Path) -> object:
        """What a JSON file holds. MissingData if it is not there, ValueError if it is none."""
        try:
            return parse_json(self.file(path).read_bytes())
        except MissingData:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.title}: {path} cannot be read ({error}); it may be cut off: fetch it again"
            ) from error


def image_names(folder: str | Path) -> list[str]:
    """The images directly inside a folder, sorted; hidden files are none."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1][1:].lower() in IMAGE_EXTENSIONS
            and not entry.name.startswith(".")
        )


def folder_names(folder: str | Path) -> list[str]:
    """The folders directly inside a folder, sorted; hidden ones are none."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
