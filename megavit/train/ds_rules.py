"""Rules that values of a JSON file obey: a rule names what is wrong with a value, the key that has it and the
fix, on one line. `ds_keys` is written in them. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megavit.fields import nearest

_SHOWN_CHARACTERS = 60


class Rule(Protocol):
    """What the value of one key must be. `words` completes the sentence "it must be"."""

    @property
    def words(self) -> str: ...

    def problems(self, name: str, value: Any) -> Iterator[str]:
        """One line for each thing that is wrong with `value`, with its dotted `name` and the fix."""
        ...


@dataclass(frozen=True)
class Value:
    """A single value, or a list of them."""

    fits: Callable[[Any], bool]
    words: str

    def problems(self, name: str, value: Any) -> Iterator[str]:
        if not self.fits(value):
            why = ' ("auto" is filled in by Hugging Face\'s Trainer only)' if value == "auto" else ""
            yield f"{name} is {shown(value)}; it must be {self.words}{why}"


@dataclass(frozen=True)
class SwitchedOff:
    """The block of a feature that must be switched off in so many words. DeepSpeed does not get to see it."""

    reason: str
    words = 'an object with "enabled": false, or absent'

    def problems(self, name: str, value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} is {shown(value)}; it must be {self.words}: {self.reason}"
        elif value.get("enabled") is not False:
            enabled = shown(value["enabled"]) if "enabled" in value else "missing"
            yield f"{name}.enabled is {enabled}; it must be false: {self.reason}"


@dataclass(frozen=True)
class Block:
    """An object: the keys that are accepted in it, those that it cannot do without, and for keys that are
    refused what to do instead."""

    accepted: Mapping[str, Rule]
    refused: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return "an object" + (f" with {' and '.join(self.required)}" if self.required else "")

    def problems(self, name: str, value: Any) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{name} is {shown(value)}; it must be {self.words}"
            return
        prefix = f"{name}." if name else ""
        for key in self.required:
            if key not in value:
                yield f"{prefix}{key} is missing; it must be {self.accepted[key].words}"
        for key, item in value.items():
            full_name = prefix + (key if key.isidentifier() else shown(key))
            if key in self.accepted:
                yield from self.accepted[key].problems(full_name, item)
            elif key in self.refused:
                yield f"{full_name} is {shown(item)}; {self.refused[key]}"
            else:
                elsewhere = [prefix + path for path in self.paths() if path.endswith(f".{key}")]
                fix = f"; did you mean {elsewhere[0]!r}?" if elsewhere else nearest(key, self.accepted)
                yield f"{full_name} is {shown(item)}, an unknown key{fix or '; remove it'}"

    def paths(self) -> Iterator[str]:
        """The dotted names of all keys that are accepted, at any depth."""
        for key, rule in self.accepted.items():
            yield key
            if isinstance(rule, Block):
                yield from (f"{key}.{path}" for path in rule.paths())


def shown(value: Any) -> str:
    """The value as the file has it, on one line and not too long."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return "a nested list"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def is_number(value: Any) -> bool:
    """JSON as Python reads it knows NaN and Infinity; and true is no number."""
    limit = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def number(words: str, fits: Callable[[float], bool]) -> Value:
    return Value(lambda value: is_number(value) and fits(value), words)


def count(words: str = "a whole number of at least 1") -> Value:
    return Value(lambda value: is_number(value) and isinstance(value, int) and 1 <= value < 2**63, words)


def elements(least: int, step: int = 1) -> Value:
    """A number of tensor elements. It may be written as 2e8, which JSON reads as a float."""
    words = f"{'an even' if step == 2 else 'a'} whole number of at least {least}"
    return number(words, lambda value: least <= value < 2**63 and value % step == 0)


def one_of(*values: Any, because: str = "") -> Value:
    """One of `values`; true is not 1."""
    words = [json.dumps(value) for value in values]
    words = [", ".join(words[:-1]), words[-1]] if len(words) > 1 else words
    return Value(
        lambda value: any(
            value == known and isinstance(value, bool) == isinstance(known, bool) for known in values
        ),
        " or ".join(words) + because,
    )


def only(value: Any, reason: str) -> Value:
    """A key that may stay in a file as long as it says what happens anyway."""
    return one_of(value, because=f" or absent: {reason}")


FLAG = Value(lambda value: isinstance(value, bool), "true or false")
