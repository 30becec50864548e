"""The manifest of a checkpoint: a JSON object with a checksum, whose every field is checked when it is read.

What `read_manifest` returns can be relied on: every field is there and has its type, every number lies in
its range, every file name is the name of a file. Anything else is a `CheckpointError` that names the
manifest, the field and the value found. `Checkpoint.check_tiling` sees to it that the ranks' slices fill the
tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from megavit.model.config import model_config
from megavit.parallel.layout import Layout

WEIGHT = "weight"  # the other kinds are the optimizer's own names: exp_avg, exp_avg_sq
_FORMAT = "megavit-checkpoint-2"
_WORDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object", type(None): "null"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file, and the slice [start, stop) of the flattened shard that it holds of each tensor
    (all kinds alike)."""

    name: str
    bytes: int
    crc32: int
    tp_rank: int
    slices: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Frozen:
    """Where the frozen weights of a run come from, which its checkpoints do not hold: the `exported` ones
    from the export in `folder`, whose weights have the `digest`, the `initial` ones from the run's seed.
    Layouts by logical name."""

    folder: str = ""
    digest: str = ""
    exported: dict[str, Layout] = field(default_factory=dict)
    initial: dict[str, Layout] = field(default_factory=dict)

    @property
    def layouts(self) -> dict[str, Layout]:
        return self.exported | self.initial


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    """The manifest that holds `fields`, a JSON object."""
    return {"format": _FORMAT, "checksum": _digest(fields), **fields}


def read_manifest(path: Path) -> dict[str, Any]:
    """The fields of a `Checkpoint`, all but its folder. CheckpointError for a manifest that is not there, is
    damaged, or is of another version."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path.parent} is not a committed checkpoint: {path.name} is missing"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        fields = json.loads(text)
        _require(type(fields) is dict, "it is no JSON object")
        found = fields.pop("format", None)
        if found != _FORMAT:
            raise CheckpointError(f"{path}: its format is {found!r:.60}, this version reads {_FORMAT!r}")
        _require(fields.pop("checksum", None) == _digest(fields), "its content does not match its checksum")
        return _parse(fields)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _digest(fields: dict[str, Any]) -> str:
    return f"{crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def _parse(fields: dict[str, Any]) -> dict[str, Any]:
    numbers = dict.fromkeys(("step", "tp_size", "dp_size"), int)
    objects = dict.fromkeys(("tensors", "optimizer", "state", "run", "ds_config"), dict)
    frozen = fields.pop("frozen", None)
    _check(fields, "", numbers | objects | {"kinds": list, "files": list, "saved_at": str})
    tp_size, dp_size = fields["tp_size"], fields["dp_size"]
    _require(fields["step"] >= 0, f"step is {fields['step']}")
    _require(tp_size > 0 and dp_size > 0, f"tp_size is {tp_size}, dp_size is {dp_size}")
    kinds = fields["kinds"]
    known = WEIGHT in kinds and all(type(kind) is str for kind in kinds)
    _require(known, f"kinds is {kinds!r:.60}, not a list of names with {WEIGHT!r} in it")
    layouts = {name: _layout(name, item, tp_size) for name, item in fields.pop("tensors").items()}
    files = [_rank_file(number, item, list(layouts)) for number, item in enumerate(fields["files"])]
    if len(files) != tp_size * dp_size:
        raise ValueError(f"files lists {len(files)} ranks of dp {dp_size} x tp {tp_size}")
    for number, file in enumerate(files):
        _require(file.tp_rank == number % tp_size, f"files[{number}].tp_rank is {file.tp_rank}")
    _check(fields["optimizer"], "optimizer.", {"type": str, "groups": list, "steps": dict})
    for name, steps in fields["optimizer"]["steps"].items():
        _require(type(steps) is int and steps >= 0, f"optimizer.steps.{name} is {steps!r:.60}")
    model = fields["run"].get("model")
    _require(type(model) is dict, f"run.model is {model!r:.60}, not an object")
    try:
        model_config(model)  # names a field that this version does not know, before any work
    except (ValueError, TypeError) as error:
        raise ValueError(f"run.model: {error}") from error
    found = fields | {"kinds": tuple(kinds), "layouts": layouts, "files": tuple(files)}
    return found if frozen is None else found | {"frozen": _frozen(frozen, tp_size)}


def _frozen(item: Any, tp_size: int) -> Frozen:
    _check(item, "frozen.", {"folder": str, "digest": str, "exported": dict, "initial": dict})
    layouts = {
        kind: {name: _layout(name, layout, tp_size) for name, layout in item[kind].items()}
        for kind in ("exported", "initial")
    }
    _require(bool(item["digest"]) or not layouts["exported"], "frozen.digest is empty")
    return Frozen(item["folder"], item["digest"], **layouts)


def _layout(name: str, item: Any, tp_size: int) -> Layout:
    _check(item, f"tensors.{name}.", {"shape": list, "dim": (int, type(None)), "parts": list})
    shape, dim, parts = item["shape"], item["dim"], item["parts"]
    sizes = all(type(size) is int and size > 0 for size in [*shape, *parts])
    _require(bool(shape) and sizes, f"tensors.{name} has shape {shape!r:.60} and parts {parts!r:.60}")
    if dim is None:
        fits = not parts
    elif dim == 1:  # a row-parallel weight, cut into equal parts
        fits = len(shape) == 2 and parts == shape[1:] and shape[1] % tp_size == 0
    else:
        fits = dim == 0 and sum(parts) == shape[0]
    _require(fits, f"tensors.{name} of shape {shape!r:.60} cannot be cut along dim {dim} into {parts!r:.60}")
    return Layout(tuple(shape), dim, tuple(parts))


def _rank_file(number: int, item: Any, names: list[str]) -> RankFile:
    types = {"name": str, "bytes": int, "crc32": int, "tp_rank": int, "slices": list}
    _check(item, f"files[{number}].", types)
    _require(Path(item["name"]).name == item["name"], f"files[{number}].name is {item['name']!r:.60}")
    slices = {}
    for place in item["slices"]:
        numbers = type(place) is list and len(place) == 3 and all(type(value) is int for value in place)
        if not (numbers and 0 <= place[0] < len(names) and 0 <= place[1] <= place[2]):
            raise ValueError(f"files[{number}] has the slice {place!r:.60}, not [tensor, start, stop]")
        slices[names[place[0]]] = (place[1], place[2])
    return RankFile(**item | {"slices": slices})


def _check(fields: Any, owner: str, types: dict[str, Any]) -> None:
    """ValueError unless `fields` is an object that has all the keys of `types`, with values of these types,
    and no others."""
    if type(fields) is not dict:
        raise ValueError(f"{owner[:-1]} is {fields!r:.60}, not an object")
    for key, allowed in types.items():
        _require(key in fields, f"{owner}{key} is missing")
        kinds = allowed if isinstance(allowed, tuple) else (allowed,)
        if type(fields[key]) not in kinds:
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise ValueError(f"{owner}{key} is {fields[key]!r:.60}, not {words}")
    if unknown := sorted(fields.keys() - types.keys()):
        raise ValueError(f"{owner}{unknown[0]} is unknown")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
