"""Exports that are harmed, or whose two files are of different models: one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint.export import load_exported
from tests.mistakes.harm import (
    CONFIG,
    DEEP,
    WEIGHTS,
    Act,
    Harm,
    check,
    cut,
    export,
    folder_instead,
    gone,
    launch,
    make_run,
    nothing,
    text,
)
from tests.train.saving import RUN, ModelState


def config(**fields: Any) -> Harm:
    """The configuration with other values."""

    def harm(run: Path) -> None:
        (run / CONFIG).write_text(json.dumps(json.loads((run / CONFIG).read_text()) | fields))

    return harm


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    """Other weights."""

    def harm(run: Path) -> None:
        tensors = load_file(run / WEIGHTS)
        change(tensors)
        save_file(tensors, run / WEIGHTS)

    return harm


def weight(name: str, value: torch.Tensor) -> Harm:
    return weights(lambda tensors: tensors.update({name: value}))


def pretrained(run: Path) -> str:
    with pytest.raises(ValueError) as caught:
        MegaVit.from_pretrained(run / "export")
    return str(caught.value)


def init_from(run: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_exported(run / "export", ModelState(RUN, Mesh.single()), RUN.model)  # type: ignore[arg-type]
    return str(caught.value)


# What is wrong, how it came, what is done, what is said.
Row = tuple[str, Harm, Act, str]
CONFIGS: list[Row] = [
    ("gone", gone(CONFIG), pretrained, "export is not an exported model: config.json is missing"),
    (
        "a folder",
        folder_instead(CONFIG),
        init_from,
        "export is not an exported model: config.json is missing",
    ),
    ("empty", text(CONFIG, ""), pretrained, "export/config.json is no model's configuration"),
    ("cut off", cut(CONFIG, 99), init_from, "export/config.json is no model's configuration"),
    ("null", text(CONFIG, "null"), pretrained, "export/config.json ... it is no JSON object"),
    ("no text", text(CONFIG, b"\xff\xff"), pretrained, "export/config.json ... decode"),
    ("nested", text(CONFIG, DEEP), init_from, "export/config.json ... recursion"),
    ("an unknown field", config(width=1), pretrained, "export/config.json ... 'width'"),
    ("a text for a number", config(dim="16"), pretrained, "export/config.json is no model's configuration"),
    ("null for a number", config(depth=None), init_from, "export/config.json is no model's configuration"),
    ("a list for a number", config(depth=[1]), pretrained, "export/config.json is no model's configuration"),
    ("impossible", config(patch_size=3), init_from, "export/config.json ... patch_size 3"),
    ("a million blocks", config(depth=10**6), pretrained, "model.safetensors does not ... depth is 1000000"),
    ("no such blocks", config(depth=10**6), init_from, "model.safetensors does not ... weights of 1 blocks"),
    (
        "another width",
        config(dim=4 * 10**9),
        pretrained,
        "model.safetensors does not ... no such model",
    ),
    ("another MLP", config(mlp_dim=64), init_from, "model.safetensors does not ... mlp.up.weight has shape"),
    (
        "another classifier",
        config(num_classes=7),
        pretrained,
        "model.safetensors ... head.weight has shape (10, 16)",
    ),
    ("another pool", config(pool="mean"), init_from, "model.safetensors does not ... unknown ['pool."),
]
WEIGHT_FILES: list[Row] = [
    ("gone", gone(WEIGHTS), init_from, "export is not an exported model: model.safetensors is missing"),
    ("a folder", folder_instead(WEIGHTS), init_from, "export is not an exported model: model.safetensors"),
    ("empty", text(WEIGHTS, ""), pretrained, "export/model.safetensors is damaged"),
    ("cut off", cut(WEIGHTS, 9999), init_from, "export/model.safetensors is damaged"),
    ("cut off in the header", cut(WEIGHTS, 99), pretrained, "export/model.safetensors is damaged"),
    ("an endless header", text(WEIGHTS, b"\xff" * 9), init_from, "export/model.safetensors is damaged"),
    (
        "a web page",
        text(WEIGHTS, "<!DOCTYPE html><title>Sign in"),
        pretrained,
        "export/model.safetensors is damaged",
    ),
    (
        "one less",
        weights(lambda t: t.pop("norm.weight")),
        init_from,
        "model.safetensors ... missing ['norm.weight']",
    ),
    ("one more", weight("x", torch.ones(1)), pretrained, "model.safetensors ... unknown ['x']"),
    ("whole numbers", weight("norm.weight", torch.ones(16).int()), init_from, "norm.weight has the type I32"),
    (
        "position is no grid",
        weight("embed.position", torch.ones(15, 16)),
        init_from,
        "position has shape (15, 16)",
    ),
    ("position is flat", weight("embed.position", torch.ones(256)), pretrained, "position has shape (256,)"),
]
PROGRAM: list[Row] = [
    ("no such folder", nothing, launch("export RUN/none RUN/out"), "run/none does not exist ... status 1"),
    ("no such step", nothing, launch("export RUN RUN/out --step 5"), "of step 5; there are: ... status 1"),
    (
        "a word for a step",
        nothing,
        launch("export RUN RUN/out --step last"),
        "--step ... 'last' ... status 2",
    ),
    ("a file as out", text("out", ""), export, "error: ... run/out ... status 1"),
    (
        "a folder in the way",
        folder_instead(WEIGHTS),
        launch("export RUN RUN/export"),
        "model.safetensors ... status 1",
    ),
    ("no out", nothing, launch("export RUN"), "out ... status 2"),
    (
        "no such names",
        nothing,
        launch("export RUN RUN/out --class_names RUN/none"),
        "run/none cannot be read ... one class name a line ... status 1",
    ),
    (
        "names too few",
        text("names", "cat\ndog\n"),
        launch("export RUN RUN/out --class_names RUN/names"),
        "2 class names for the 10 classes ... status 1",
    ),
    ("kept names too few", text("classes.txt", "cat\n"), export, "run/classes.txt has 1 names ... status 1"),
]
GROUPS = {"config": CONFIGS, "weights": WEIGHT_FILES, "program": PROGRAM}
TABLE = {f"{group}: {row[0]}": row[1:] for group, rows in GROUPS.items() for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_line_that_names_the_file(whole: Path, tmp_path: Path, name: str) -> None:
    """Catches a library's exception that names no file, and memory or minutes spent before the message."""
    harm, act, words = TABLE[name]
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    harm(run)
    check(act(run), words)
