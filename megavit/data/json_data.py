"""JSON that others wrote: read with one kind of error, whatever is in it."""

from __future__ import annotations

import json
from typing import Any, TypeVar

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """What JSON text stands for. ValueError for everything that is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def json_field(value: Any, name: str, kind: type[T]) -> T:
    """Field `name` of a JSON object. ValueError if `value` is none, or the field is missing or no `kind`."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {kind_of(value)}, not an object")
    if name not in value:
        raise ValueError(f"it has no field {name!r}")
    found = value[name]
    if type(found) is not kind:  # not isinstance: true is an int to Python
        raise ValueError(f"its field {name!r} is {kind_of(found)}, not {_KINDS[kind]}")
    return found


def kind_of(value: Any) -> str:
    """What a value from JSON is, in words, with the value where that is short."""
    shown = f" ({value!r})" if isinstance(value, (str, int, float)) and len(repr(value)) < 40 else ""
    return _KINDS[type(value)] + shown


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number with a fraction",
    bool: "true or false",
    type(None): "null",
}
