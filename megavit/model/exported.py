"""An exported model on disk, opened: its configuration, and its weights, which are checked to belong to it.

Only the weights' header is read for that, so a folder that is damaged, or whose two files are of different
models, is refused before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megavit.model.config import ModelConfig, model_config
from megavit.model.embed import POSITION
from megavit.model.vit import CONFIG_FILE, WEIGHTS_FILE, MegaVit
from megavit.parallel.layout import layout_of

HEAD = ("head.weight", "head.bias")  # a classifier of other classes is another one
_OF_A_RUN = "export"  # in a run folder
_TYPES = ("F64", "F32", "F16", "BF16")


@contextmanager
def open_export(folder: Path, **overrides: Any) -> Iterator[tuple[ModelConfig, Any]]:
    """The configuration of an export, its fields replaced by `overrides`, and the open safetensors file.
    `folder` is an export or the folder of a run that has ended, which holds one.

    Raises ValueError, naming the file, when one is missing or damaged and when the weights are not those of
    the configuration; the position embedding may be of another square grid, and the classifier is not looked
    at if `overrides` ask for another number of classes.
    """
    folder = export_folder(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            why = "(see launch/export.py)"
            if (folder / "checkpoints").is_dir():
                why = f"because its run has not ended; python launch/export.py {folder} OUT writes one"
            raise ValueError(f"{folder} is not an exported model: {file} is missing {why}")
    saved = _read_config(folder / CONFIG_FILE)
    config = model_config(dataclasses.asdict(saved) | overrides)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if (found := weights.get_slice(name).get_dtype()) not in _TYPES:
                    raise ValueError(f"{path}: {name} has the type {found}, not {' or '.join(_TYPES)}")
            other_classes = config.num_classes != saved.num_classes
            _check_shapes(path, config, stored_shapes(weights), leave=HEAD if other_classes else ())
            yield config, weights
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def export_folder(folder: Path) -> Path:
    """`folder`, or the export in it if it is the folder of a run."""
    if (folder / _OF_A_RUN).is_dir() and not (folder / CONFIG_FILE).exists():
        return folder / _OF_A_RUN
    return folder


def stored_shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    """The shapes in an open safetensors file, from its header."""
    return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's weights at tp_size 1. Allocates no memory for them. ValueError for
    sizes that no memory could have."""
    try:
        with torch.device("meta"):
            model = MegaVit.from_config(config, deferred_init=True)
    except (RuntimeError, TypeError) as error:  # torch cannot count the bytes
        raise ValueError(f"there can be no such model: {str(error).splitlines()[0]}") from error
    return {name: layout_of(parameter).shape for name, parameter in model.named_parameters()}


def check_depth(config: ModelConfig, names: Mapping[str, Any]) -> None:
    """ValueError unless the weights called `names` are those of as many blocks as `config` has. Comes before
    `logical_shapes`, which takes minutes for a million blocks."""
    blocks = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(blocks) != config.depth:
        raise ValueError(f"model.depth is {config.depth}, but there are the weights of {len(blocks)} blocks")


def trunk_config(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], *, only: bool) -> ModelConfig:
    """`config` as weights of these `shapes` have it: without a classifier, if they have none and others may
    be among them (not `only`). ValueError unless all weights of the model are there, and with `only` no
    others."""
    if not only and HEAD[0] not in shapes:
        config = dataclasses.replace(config, num_classes=0)
    check_depth(config, shapes)
    expected = logical_shapes(config)
    names = expected | dict(shapes) if only else expected
    if other := [name for name in names if expected.get(name) != shapes.get(name)]:
        name = other[0]
        raise ValueError(f"{name} has shape {shapes.get(name)}, the model needs {expected.get(name)}")
    return config


def _read_config(path: Path) -> ModelConfig:
    try:
        saved = json.loads(path.read_bytes())
        if type(saved) is not dict:
            raise ValueError("it is no JSON object")
        return model_config(saved)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no model's configuration: {error}") from error


def _check_shapes(
    path: Path, config: ModelConfig, found: dict[str, tuple[int, ...]], leave: Sequence[str]
) -> None:
    try:
        check_depth(config, found)
        expected = logical_shapes(config)
        for shapes, name in itertools.product((expected, found), leave):
            shapes.pop(name, None)
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(f"missing {_some(missing)}, unknown {_some(unknown)}")
        for name, shape in expected.items():
            fits = found[name] == shape or (name == POSITION and _is_grid(found[name], config.dim))
            if not fits:
                raise ValueError(f"{name} has shape {found[name]}, the model needs {shape}")
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of its {CONFIG_FILE}: {error}") from error


def _is_grid(shape: tuple[int, ...], dim: int) -> bool:
    return len(shape) == 2 and shape[1] == dim and round(shape[0] ** 0.5) ** 2 == shape[0]


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}" if names else "none"
