"""Which results belong together, and what tells them apart: for tables, plots and TensorBoard's tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from megavit.evaluate.results import Result
from megavit.evaluate.results_file import scalars_of

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")
# What people think of first, where several settings tell the same results apart.
_FIRST = ("layer", "k", "shots", "score", "corruption", "severity")
_LAST = ("protocol", "transform")


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """In the order of their first appearance."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def measured_as(result: Result) -> tuple[str, str, str]:
    """Task, set and metric: what is compared between models."""
    return result.task, result.data, result.metric


def model_of(result: Result) -> tuple[str, str]:
    """Name and weights: two runs that stand in folders of one name are two models."""
    return result.model, result.checkpoint_digest


def facts_of(result: Result) -> dict[str, str]:
    """The settings, the protocol and the transform, in words."""
    found = {name: _shown(value) for name, value in scalars_of(result.settings).items()}
    return {**found, "protocol": result.protocol, "transform": result.transform}


def tell_apart(results: Sequence[Result]) -> list[str]:
    """What names each result among others of the same task, set and metric: `k 10, layer pooled`, or nothing.

    Named are the settings by which results of the *same* model differ, as few as will do. A setting in which
    two models differ (the chosen weight decay, the transform) does not keep them out of one row.
    """
    facts = [facts_of(result) for result in results]
    models = [model_of(result) for result in results]

    def kinds(names: Sequence[str]) -> int:
        return len({(model, _values(fact, names)) for model, fact in zip(models, facts, strict=True)})

    names = _in_order(results, facts)
    chosen: list[str] = []
    for name in names:
        if kinds(chosen) < kinds(names) and kinds([*chosen, name]) > kinds(chosen):
            chosen.append(name)
    return [
        ", ".join(fact[name] if name in _LAST else f"{name} {fact[name]}" for name in chosen if name in fact)
        for fact in facts
    ]


def best_known(results: Sequence[Result]) -> Result:
    """Of results of the same model and settings: of all images before a trial, then the newest."""
    return max(results, key=lambda result: (result.limit is None, result.date))


def short_names(keys: Sequence[tuple[str, ...]]) -> list[str]:
    """A name of each key from the parts in which the keys differ; of a single key, its first part."""
    varying = [i for i in range(len(keys[0])) if len({key[i] for key in keys}) > 1] if keys else []
    return [" ".join(key[i] for i in varying if key[i]) or key[0] for key in keys]


def model_names(models: Sequence[tuple[str, str]]) -> list[str]:
    """Names for `model_of`, with a part of the digest where one name stands for several weights."""
    names = [name for name, _ in models]
    return [name if names.count(name) == 1 else f"{name} [{digest[:8]}]" for name, digest in models]


def _in_order(results: Sequence[Result], facts: Sequence[Mapping[str, str]]) -> list[str]:
    """All names of settings: the usual ones first, numbers with a point (found ones, often) late."""
    points = {
        name for result in results for name, value in result.settings.items() if isinstance(value, float)
    }
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    first = [name for name in _FIRST if name in names]
    rest = [name for name in names if name not in (*_FIRST, *_LAST)]
    return [*first, *sorted(rest, key=lambda name: name in points), *_LAST]


def _values(fact: Mapping[str, str], names: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(fact.get(name) for name in names)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
