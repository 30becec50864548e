"""Labels of a sample: one class (`cls`) or several (`json`), carried as a short padded list of class ids."""

from __future__ import annotations

import numpy as np

from megavit.data.json_data import parse_json


def parse_labels(extension: str, data: bytes, num_classes: int, *, allow_none: bool) -> list[int]:
    """Distinct class ids, ascending, of a `cls` (a number) or `json` (a list, or {"labels": [...]}) member.

    Raises ValueError, saying what is wrong, for anything else, an id outside 0..num_classes-1, and, without
    `allow_none`, an empty list.
    """
    labels = read_labels(extension, data)
    if not labels and not allow_none:
        raise ValueError("it has no label, which only the sigmoid loss can use")
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(
                f"label {label} is outside 0..{num_classes - 1}; set --model.num_classes to the data's"
            )
    return sorted(set(labels))


def read_labels(extension: str, data: bytes) -> list[int]:
    """The numbers in a `cls` or `json` member as they are written. ValueError for anything else."""
    text = data.decode("utf-8", "replace").strip()
    if extension == "cls":
        if not (text.removeprefix("-").isdecimal() and len(text) < 20):
            raise ValueError(f"label {text[:40]!r} is not a class number")
        return [int(text)]
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"json label cannot be parsed: {error}") from error
    labels = value.get("labels") if isinstance(value, dict) else value
    # bool is an int to Python, and JSON's true is no class.
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(
            f'json label {text[:60]!r} is neither a list of class numbers nor {{"labels": [...]}}'
        )
    return labels


def pad_labels(labels: list[int], width: int) -> np.ndarray:
    """int32 [width], filled up with -1. ValueError if there are more labels."""
    if len(labels) > width:
        raise ValueError(f"it has {len(labels)} labels, more than --data.max_labels {width}")
    padded = np.full(width, -1, np.int32)
    padded[: len(labels)] = labels
    return padded
