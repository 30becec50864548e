"""Plots: real pictures of what is there, and none of what is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megavit.evaluate import plots
from megavit.evaluate.plots import draw_all
from megavit.evaluate.results import Result
from tests.evaluate.made import made, measured

OTHER = {"model": "timm:vit_tiny", "checkpoint_digest": "b" * 32}
BINS = [[0, None, None], [10, 0.5, 0.4], [30, 0.9, 0.95]]


@pytest.fixture(autouse=True)
def needs_matplotlib() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")


def everything(**facts: Any) -> list[Result]:
    severities = {"fog": [0.9, 0.8, 0.7, 0.6, 0.5], "snow": [0.8, 0.7, float("nan"), 0.5, 0.4]}
    return [
        *(
            made(measured(value=v, settings={"layer": i, "l2": v}), **facts)
            for i, v in enumerate((0.5, 0.8, 0.9))
        ),
        made(measured(value=0.95, settings={"layer": "pooled"}), **facts),
        *(
            made(measured(value=0.5 + s / 100, settings={"shots": s}), "fewshot", **facts)
            for s in (1, 5, 10, 25)
        ),
        made(measured("ece", 0.03, settings={"bins": BINS}), "calibration", **facts),
        made(measured("mce", 0.8, settings={"accuracy": severities}), "corruption", **facts),
        made(measured("aurc", 0.01, settings={"curve": [[0.5, 0.01], [1.0, 0.05]]}), "selective", **facts),
        *(made(measured(f"auroc_{s}", v), "ood", **facts) for s, v in (("msp", 0.8), ("energy", 0.9))),
    ]


def names(written: list[Path]) -> set[str]:
    return {path.name for path in written}


def test_every_plot_is_a_picture(tmp_path: Path) -> None:
    """Catches an empty file, or a white sheet."""
    written = draw_all([*everything(), *everything(**OTHER)], tmp_path)
    assert names(written) == set(plots._PLOTS)
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 400 and picture.height > 300
            colours = picture.convert("RGB").getcolors(picture.width * picture.height)
            assert colours and len(colours) > 10, path


def test_one_point_is_enough(tmp_path: Path) -> None:
    """Catches a plot that needs two points: of `--layers 11`, one number of shots, one bin, one severity."""
    results = [
        made(measured(settings={"layer": 11})),
        made(measured(settings={"shots": 10}), "fewshot"),
        made(measured("ece", settings={"bins": [[1, 1.0, 1.0]]}), "calibration"),
        made(measured("mce", settings={"accuracy": {"fog": [0.5]}}), "corruption"),
        made(measured("aurc", settings={"curve": [[1.0, 0.0]]}), "selective"),
        made(measured("auroc_msp"), "ood"),
    ]
    assert names(draw_all(results, tmp_path)) == set(plots._PLOTS)


def test_what_has_no_data_is_not_drawn(tmp_path: Path) -> None:
    """Catches a crash, or an empty picture, for settings that are missing or of another form."""
    results = [
        made(measured(settings={"layer": "pooled"})),
        made(measured(), "fewshot"),
        made(measured("ece", settings={"bins": 15}), "calibration"),
        made(measured("nll", settings={"bins": []}), "calibration"),
        made(measured("mce", settings={"accuracy": 0.5}), "corruption"),
        made(measured("aurc", settings={"curve": [[1.0], "x"]}), "selective"),
    ]
    assert draw_all(results, tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert draw_all([], tmp_path) == []


def lines(results: list[Result], setting: str = "layer") -> dict[str, tuple[list[float], list[float]]]:
    return {line.name: (line.x, line.y) for line in plots._lines_over(plots._named(results), setting)}


def test_a_line_for_each_model_and_protocol() -> None:
    """Catches points of two models, or of two values of k, that are joined into one line, or out of order."""
    results = [
        made(measured(value=v, settings={"layer": layer, "k": k}), "knn", **who)
        for who in ({}, OTHER)
        for layer, v in ((1, 0.5), (0, 0.25))
        for k in (10, 20)
    ]
    found = lines(results)
    assert set(found) == {f"{m} k {k}" for m in ("runs/digits", "timm:vit_tiny") for k in (10, 20)}
    assert all(points == ([0, 1], [25, 50]) for points in found.values())


def test_layers_by_name() -> None:
    """Catches blocks whose number stands in a word, and features of several kinds joined into one line."""
    results = [
        made(measured(value=0.5, settings={"layer": f"block.{i} {kind}"}))
        for i in (2, 10)
        for kind in ("mean", "max")
    ]
    results.append(made(measured(value=0.9, settings={"layer": "pooled"})))
    assert lines(results) == {
        "block mean": ([2, 10], [50, 50]),
        "block max": ([2, 10], [50, 50]),
        "pooled": ([], [90]),
    }
    assert lines(results[-1:]) == {}, "no depth to draw it against"


def test_a_trial_is_named_in_the_picture() -> None:
    """Catches a trial's line that looks like a result's."""
    assert list(lines([made(measured(settings={"layer": 1}), limit=5)])) == ["runs/digits (trial)"]


def test_bins_and_curves_by_column(tmp_path: Path) -> None:
    """Catches columns by name, the other form that a table may have."""
    bins = dict(zip(("count", "confidence", "accuracy"), map(list, zip(*BINS, strict=True)), strict=True))
    results = [
        made(measured("ece", settings={"bins": 15, "reliability": bins}), "calibration"),
        made(measured("aurc", settings={"curve": {"coverage": [0.5, 1.0], "risk": [0, 0.1]}}), "selective"),
    ]
    assert names(draw_all(results, tmp_path)) == {"reliability.png", "risk_coverage.png"}
    (named, *_) = plots._named(results)
    assert plots._bins(named)[1:] == BINS[1:]


def test_without_matplotlib_there_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a table that fails, or a note for every plot, because the extra is not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert draw_all(everything(), tmp_path) == []
    assert capsys.readouterr().err == "note: no plots without matplotlib: pip install 'megavit[plot]'\n"
