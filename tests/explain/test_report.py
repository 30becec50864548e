"""What an explanation leaves on disk: pictures, numbers, and the page, read as a browser reads it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megavit
from megavit.explain.charts import path_plot
from megavit.explain.explanation import Explanation, Shown
from megavit.explain.pictures import overlay, picture
from megavit.explain.provenance import TrainingImage
from megavit.explain.report import PAGE, Report
from tests.explain.test_explanation import photo
from tests.exports import write_export

NASTY = "<script>alert('1')</script> & \"ñ\""
_VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    export = write_export(tmp_path_factory.mktemp("export"), names=(NASTY, "b\udcff", "c"), crop=1.0)
    explained = megavit.explain(export, photo(), NASTY, methods=["located", "frozen", "rollout"])
    image = TrainingImage(3, f"x.tar/{NASTY}", 0, NASTY, 0.25, "x.tar", 7, (1, 5, 9, 13))
    return dataclasses.replace(
        explained,
        name=f"photos/{NASTY}.png",
        label=NASTY,
        training={"similar": [Shown(image, explained.pixels)]},
    )


class Page(HTMLParser):
    """A page in the tags, addresses and texts that a browser makes of it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            f"{value}" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(folder: Path, *explained: Explanation) -> Page:
    with Report(folder, NASTY, explained[0].methods) as report:
        for one in explained:
            report.add(one)
    return Page((folder / PAGE).read_text())


def test_names_are_text_and_nothing_is_loaded(found: Explanation, tmp_path: Path) -> None:
    """Catches names that are taken for HTML, tags that are not closed, and pictures from elsewhere."""
    page = written(tmp_path, found, found)
    assert page.tags.count("section") == 2 and "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 2 * (1 + 3 + 1) and page.tags.count("svg") == 2
    text = " ".join(page.texts)
    assert text.count(NASTY) > 10 and "b\\udcff" in text and "url(" not in text and "@import" not in text
    for address in page.addresses:
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).load()
    assert "read at step 1, 5, 9 and 1 more" in text and "same for every class" in text
    assert "default-src 'none'" in (tmp_path / PAGE).read_text()


def test_the_files_have_the_numbers(found: Explanation, tmp_path: Path) -> None:
    """Catches maps that are rounded or of another method, folders that take each other's place, and names
    that lead out of the folder."""
    written(tmp_path, found, dataclasses.replace(found, name="../../etc/passwd"))
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["001-script_", "002-passwd"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {
            "explanation.json",
            "image.png",
            *(f"{name}.{kind}" for name in found.maps for kind in ("npy", "png")),
        }
        for name, values in found.maps.items():
            saved = np.load(folder / f"{name}.npy")
            assert saved.dtype == np.float32 and np.array_equal(saved, values.numpy())
    record = json.loads((folders[0] / "explanation.json").read_text())
    assert record["target"]["name"] == NASTY and record["name"] == found.name
    (image,) = record["training"]["similar"]
    assert image["steps"] == [1, 5, 9, 13] and image["shard"] == "x.tar" and "picture" not in image


def test_a_page_is_there_whatever_happens(found: Explanation, tmp_path: Path) -> None:
    """Catches a page that is lost with the images after it, and one that is there before it is whole."""
    with pytest.raises(KeyboardInterrupt), Report(tmp_path, "x", found.methods) as report:
        report.add(found)
        assert not (tmp_path / PAGE).exists()
        raise KeyboardInterrupt
    assert Page((tmp_path / PAGE).read_text()).tags.count("section") == 1
    assert not list(tmp_path.glob(".*"))


def test_an_unmeasured_explanation_says_so(found: Explanation, tmp_path: Path) -> None:
    """Catches an empty table that looks like a good result."""
    page = written(tmp_path, dataclasses.replace(found, faithfulness={}, label="", training={}))
    assert "was not measured" in " ".join(page.texts)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_has_its_colour(channels: int) -> None:
    """Catches rows for columns, colours of the wrong sign, and colour where there is no evidence."""
    pixels = np.full((12, 12, channels), 128, np.uint8)
    values = np.zeros((2, 3), np.float32)
    values[0, 2], values[1, 0] = 2.0, -2.0
    laid = np.asarray(overlay(pixels, values, signed=True)).astype(int)
    side = picture(pixels).width
    assert side >= 384 and laid.shape[1] == side and laid.shape[0] > side

    def at(row: int, column: int) -> np.ndarray:
        return laid[int((row + 0.5) * side / 2), int((column + 0.5) * side / 3)]

    assert at(0, 2)[0] > 1.5 * at(0, 2)[2] and at(1, 0)[2] > 1.5 * at(1, 0)[0]
    assert at(0, 0).tolist() == at(1, 1).tolist() == [128] * 3
    legend = laid[side + 10]
    assert legend[0, 2] > legend[0, 0] and legend[-1, 0] > legend[-1, 2]
    positive = np.asarray(overlay(pixels, abs(values), signed=False)).astype(int)
    assert np.array_equal(positive[0, side - 1], at(0, 2)) and positive[side + 10, 0, 2] == 200


@pytest.mark.parametrize("values", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.full((4, 4), np.inf)])
def test_maps_without_any_evidence_have_no_colour(values: np.ndarray) -> None:
    """Catches a division by zero, and NaN as a colour."""
    pixels = np.asarray(photo())
    laid = np.asarray(overlay(pixels, values.astype(np.float32), signed=True))
    grey = np.asarray(picture(pixels).convert("L"))
    assert np.array_equal(laid[: len(grey)], np.stack([grey] * 3, -1))


def test_a_plot_has_the_numbers(found: Explanation) -> None:
    """Catches bars on the wrong side of zero, of the wrong block, or beyond the plot."""
    path = found.path._replace(
        probabilities=torch.tensor([0.0, 0.5, 1.0]),
        attention=torch.tensor([4.0, 0.0]),
        mlp=torch.tensor([-2.0, 1.0]),
    )
    plot = path_plot(path)
    points = re.search(r'points="([^"]+)"', plot)
    assert points
    ys = [float(point.split(",")[1]) for point in points[1].split()]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2]) and ys[0] > ys[2]
    bars = [
        tuple(float(number) for number in bar)
        for bar in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', plot)
    ]
    (up, none), (down, small) = bars[:2], bars[2:]
    zero = down[1]
    assert up[1] + up[3] == pytest.approx(zero, abs=0.2) and small[1] + small[3] == pytest.approx(
        zero, abs=0.2
    )
    assert up[3] == pytest.approx(2 * down[3], abs=0.2) and none[3] == 0.0
    assert up[0] + up[2] == pytest.approx(down[0], abs=0.2) and small[0] > down[0]
