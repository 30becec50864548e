"""What an explanation leaves on disk: numbers, maps, pictures, and one page about all images."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megavit.explain.explanation import Explanation
from megavit.explain.methods import METHODS
from megavit.explain.page import FOOT, head, section
from megavit.explain.pictures import overlay, picture, png

PAGE = "index.html"
RECORD = "explanation.json"


class Report:
    """A folder that grows image by image:

        index.html              the page, complete when the report is closed
        001-photo/              of each image
            explanation.json    `Explanation.as_json`
            image.png           as the model sees it
            METHOD.npy          each map, float32 [h, w]
            METHOD.png          laid over the image, with a legend

    Files of an earlier report in the same folder are replaced. Holds one image at a time.
    """

    def __init__(self, folder: str | Path, title: str, methods: Sequence[str]):
        self.folder, self.count = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.folder / f".{PAGE}.unfinished"
        # Names of files and classes may hold bytes that are no text.
        self._page = self._unfinished.open("w", encoding="utf-8", errors="backslashreplace")
        self._page.write(head(title, methods))

    def add(self, found: Explanation) -> Path:
        """Write one image's files and its part of the page; the folder of the files."""
        self.count += 1
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(found.name).stem)[:40]
        folder = self.folder / f"{self.count:03d}-{stem}"
        folder.mkdir(exist_ok=True)
        (folder / "image.png").write_bytes(png(picture(found.pixels)))
        for name, values in found.maps.items():
            np.save(folder / f"{name}.npy", values.numpy())
            laid_over = overlay(found.pixels, values.numpy(), signed=METHODS[name].signed)
            (folder / f"{name}.png").write_bytes(png(laid_over))
        (folder / RECORD).write_text(json.dumps(found.as_json(), indent=1) + "\n")
        self._page.write(section(self.count, found))
        return folder

    def close(self) -> Path:
        """Finish the page; its path."""
        self._page.write(FOOT)
        self._page.close()
        return self._unfinished.replace(self.folder / PAGE)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What there is becomes the page, also after an error or an interruption."""
        self.close()
