"""What the numbers of dense planes mean: a file `dense.json` beside the shards. Imports neither torch nor
numpy.

    {"depth": {"scale": 0.001, "invalid": 0, "max_m": 10}}
    {"mask": {"invalid": 255, "classes": 150}}

The keys are the first parts of the members' names: depth of `KEY.depth.png` or `KEY.depth.npy`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavit.data.json_data import kind_of, parse_json

PLANES_FILE = "dense.json"


@dataclass(frozen=True)
class PlaneFacts:
    """How to read a plane.

    Args:
        scale: what a stored number is multiplied with; it makes metres of depth.
        invalid: the stored number that means that nothing is known of a pixel.
        max_m: metres of depth up to which the data set is measured.
        classes: of a mask; every stored number but `invalid` is below it.
    """

    scale: float = 1.0
    invalid: float | None = None
    max_m: float | None = None
    classes: int | None = None


def claim_planes(folder: str | Path, planes: Mapping[str, PlaneFacts]) -> None:
    """Write `folder/dense.json`, without what is not known. ValueError if there is one that says something
    else: it holds for all shards of a folder."""
    path = Path(folder) / PLANES_FILE
    if path.is_file() and planes_beside(str(path)) != dict(planes):
        raise ValueError(f"{path} says something else of other shards; choose another --out or delete it")
    found = {name: _to_json(facts) for name, facts in planes.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def planes_beside(shards: str) -> dict[str, PlaneFacts]:
    """What is known of the planes of `shards` (a manifest, or a pattern of local files), by name; empty
    without a file. ValueError naming the file if it cannot be read."""
    path = Path(shards).parent / PLANES_FILE
    if not shards or not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {kind_of(found)}, not an object")
        return {name: _from_json(name, value) for name, value in found.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not say what planes mean: {error}") from error


def _to_json(facts: PlaneFacts) -> dict[str, float]:
    found = dataclasses.asdict(facts)
    if facts.classes is not None:
        del found["scale"]  # of class numbers it means nothing
    return {name: value for name, value in found.items() if value is not None}


def _from_json(name: str, value: Any) -> PlaneFacts:
    known = [field.name for field in dataclasses.fields(PlaneFacts)]
    if not isinstance(value, dict) or not value.keys() <= set(known):
        raise ValueError(f"{name!r} must be an object with some of {', '.join(known)}")
    for key, number in value.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{name!r} has {kind_of(number)} as {key!r}, not a number")
        if key == "classes" and not (type(number) is int and number > 0):
            raise ValueError(f"{name!r} has {number} as 'classes', not a number of classes")
        if key in ("scale", "max_m") and number <= 0:
            raise ValueError(f"{name!r} has {number} as {key!r}, which must be positive")
    return PlaneFacts(**value)
