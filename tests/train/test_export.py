"""What an export holds beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import megavit
from megavit.data.class_names import read_class_names, write_class_names
from megavit.data.preprocessing import Preprocessing
from megavit.launch import export
from megavit.train.checkpoint.export import export_weights
from megavit.train.checkpoint.folder import open_step
from tests.mistakes.harm import make_run
from tests.train.saving import RUN, save_steps

DIGITS = [f"digit {i}" for i in range(10)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_says_how_photos_are_prepared(tmp_path: Path) -> None:
    """Catches a transform or a loss in the file that are not the run's."""
    save_steps(tmp_path, 4)
    write_class_names(tmp_path, DIGITS)
    export_weights(open_step(tmp_path), tmp_path / "out")
    files = content(tmp_path / "out")
    assert files.keys() == {"config.json", "model.safetensors", "preprocessing.json", "classes.txt"}
    assert read_class_names(tmp_path / "out" / "classes.txt") == DIGITS
    assert json.loads(files["preprocessing.json"]) == {
        "format": 1,
        "image_size": RUN.model.image_size,
        "channels": 1,
        "crop": RUN.data.eval_crop,
        "interpolation": "bilinear",
        "antialias": True,
        "mean": [0.5],
        "std": [0.5],
        "link": "sigmoid",
    }
    assert megavit.load(tmp_path / "out").names == tuple(DIGITS)


MODEL = {"image_size": 32, "channels": 3}
DATA = {"eval_crop": 0.875, "antialias": False}


@pytest.mark.parametrize(
    ("fields", "link"),
    [
        ({"loss": "softmax"}, "softmax"),
        ({"loss": "sigmoid"}, "sigmoid"),
        ({"task": {"loss": "sigmoid"}}, "sigmoid"),
        ({"task": {"loss": "silog"}}, "none"),
        ({"task": "depth"}, "none"),
        ({}, "none"),
    ],
)
def test_the_link_is_that_of_the_loss(fields: dict[str, Any], link: str) -> None:
    """Catches probabilities of classes from outputs that are none, and a loss that is not found."""
    found = Preprocessing.of_run({"model": MODEL, "data": DATA} | fields)
    assert found.link == link and found.mean == (0.5, 0.5, 0.5) and not found.antialias


@pytest.mark.parametrize("run", [{"model": MODEL}, {"model": MODEL, "data": 3}, {"model": MODEL, "data": {}}])
def test_a_run_without_its_fields_is_refused(run: dict[str, Any]) -> None:
    """Catches a default in place of what the run did."""
    with pytest.raises(ValueError, match="lacks a field or has a wrong one"):
        Preprocessing.of_run(run)


def test_an_earlier_exports_names_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the names of another model in the same folder, remains of an export that was killed, and names
    beside the shards, which may have been written since the run."""
    monkeypatch.chdir(tmp_path)
    beside = Path(RUN.data.shards).parent
    beside.mkdir(parents=True)
    write_class_names(beside, DIGITS)
    save_steps(tmp_path, 4)
    out = tmp_path / "out"
    (out / "export.partial").mkdir(parents=True)
    (out / "export.partial" / "model.safetensors").write_bytes(b"x")
    export_weights(open_step(tmp_path), out, class_names=DIGITS)
    assert megavit.load(out).names == tuple(DIGITS)
    export_weights(open_step(tmp_path), out)
    assert content(out).keys() == {"config.json", "model.safetensors", "preprocessing.json"}
    assert megavit.load(out).names == tuple("0123456789")


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    """Catches an export of which half the files are new."""
    out = make_run(tmp_path) / "export"
    before = content(out)
    save_steps(tmp_path, 12)
    checkpoint = open_step(tmp_path)
    (checkpoint.folder / checkpoint.files[0].name).write_bytes(b"")
    with pytest.raises(ValueError):
        export_weights(checkpoint, out, class_names=DIGITS, verify=False)
    assert content(out) == before


def test_names_can_be_given_to_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an older run whose model can get no names any more."""
    save_steps(tmp_path, 4)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in DIGITS))
    words = [str(tmp_path), str(tmp_path / "out"), "--class_names", str(tmp_path / "names.txt")]
    assert export.main(words) == 0 and "for megavit.load('" in capsys.readouterr().out
    assert megavit.load(tmp_path / "out").names == tuple(DIGITS)
