"""The fields of a configuration dataclass: their names, types, defaults and descriptions, and values checked
against the types.

A dataclass is written once, with annotations and an `Args:` section in its docstring; flags, configuration
files, help texts and the checks on construction are all derived from it. Imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Field:
    """One value of a configuration: its annotation, its default, and what the docstring says about it."""

    hint: Any
    default: Any
    help: str


def fields_of(config: type, **parts: type) -> dict[str, Field]:
    """The fields of a dataclass by name; those of a nested dataclass under dotted names (`model.depth`).
    `parts` are classes that take the place of those which the annotations of nested dataclasses name."""
    found: dict[str, Field] = {}
    hints, descriptions = _hints(config), describe_fields(config)
    groups = groups_of(config) | parts
    for field in dataclasses.fields(config):
        if field.name in groups:
            found |= {f"{field.name}.{name}": item for name, item in fields_of(groups[field.name]).items()}
        else:
            found[field.name] = Field(hints[field.name], field.default, descriptions[field.name])
    return found


def groups_of(config: type) -> dict[str, type]:
    """The nested dataclasses by the name of their field."""
    hints = _hints(config).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def describe_fields(config: type) -> dict[str, str]:
    """The `Args:` section of a dataclass's docstring, one text per field, and those of its bases."""
    found: dict[str, str] = {}
    for base in config.__bases__:
        if dataclasses.is_dataclass(base):
            found |= describe_fields(base)
    lines = inspect.cleandoc(config.__doc__ or "")
    _, _, section = lines.partition("\nArgs:\n")
    name = ""
    for line in section.splitlines():
        if start := re.match(r" {4}(\w+): (.*)", line):
            name, found[start[1]] = start[1], start[2]
        elif line.startswith(" " * 8):
            found[name] += " " + line.strip()
        else:
            break
    return found


def check_types(config: Any, owner: str = "") -> None:
    """For `__post_init__` of a frozen dataclass: make every value exactly of its annotated type (an int for a
    float becomes a float). ValueError naming the field, after the prefix `owner`, if it cannot be."""
    config_type: type = type(config)
    for name, hint in _hints(config_type).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, as_type(value, hint))
        except ValueError as error:
            raise ValueError(f"{owner}{name} {error}") from None


def as_type(value: Any, hint: Any) -> Any:
    """`value`, as Python, JSON or YAML has it, as the annotated type `hint`.

    Numbers must be finite; numpy's become Python's; `none` in words is None. ValueError, which says what the
    value must be but not whose it is, for anything else.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in options:
            try:
                return as_type(value, option)
            except ValueError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif origin is tuple and options[-1] is Ellipsis:
        if isinstance(value, list | tuple):
            return tuple(as_type(part, options[0]) for part in value)
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(options):
            return tuple(as_type(part, option) for part, option in zip(value, options, strict=True))
    elif hint is types.NoneType:
        if value is None or value == "none":
            return None
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
    elif isinstance(value, hint):  # bool, str, or a nested dataclass
        return value
    near = nearest(value, options) if origin is Literal and isinstance(value, str) else ""
    raise ValueError(f"must be {describe(hint)}, got {shown(value)}{near}")


def describe(hint: Any) -> str:
    """An annotated type in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return str(options[0]) if len(options) == 1 else f"one of {', '.join(map(str, options))}"
    if origin is tuple and options[-1] is Ellipsis:
        return f"a list, each {describe(options[0])}"
    if origin is tuple:
        return f"[{', '.join(describe(option) for option in options)}]"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return words.get(hint, "none" if hint is types.NoneType else f"a {getattr(hint, '__name__', hint)}")


def shown(value: Any) -> str:
    """`repr(value)`, cut to what fits into a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` for an unknown `name`, or '' when nothing known is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def require_positive(owner: str, config: Any, *names: str) -> None:
    """ValueError, naming `owner` and the field, unless each of the fields is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{owner}{name} must be at least 1, got {getattr(config, name)}")
