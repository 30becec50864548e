"""Which results belong together, and what tells them apart: for tables, plots and TensorBoard's tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megavit.evaluate.results import Result
from megavit.evaluate.results_file import CHOICES, choices_of

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")
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


def tell_apart(results: Sequence[Result]) -> list[str]:
    """What names each result among others of the same task, set and metric: `k 10, layer pooled`, or nothing.

    Named are the choices by which results of the *same* model differ, as few as will do. A choice in which
    two models differ (the transform) does not keep them out of one row. Settings that were found (the chosen
    L2) are named only where one run of a task would have two results of one name.
    """
    facts = [_facts_of(result) for result in results]
    models = [model_of(result) for result in results]
    runs = [(model_of(result), result.limit, result.seconds) for result in results]
    everything = list(dict.fromkeys(name for fact in facts for name in fact))
    chosen = _needed(_choices(results), facts, models, [])
    chosen = _needed(everything, facts, runs, chosen)
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


def _needed(
    names: Sequence[str], facts: Sequence[Mapping[str, str]], owners: Sequence[Any], chosen: list[str]
) -> list[str]:
    """`chosen` and as many of the names as it takes to tell the results of each owner apart."""
    goal = _kinds(facts, owners, [*chosen, *names])
    for name in names:
        kinds = _kinds(facts, owners, chosen)
        if kinds < goal and kinds < _kinds(facts, owners, [*chosen, name]):
            chosen = [*chosen, name]
    return chosen


def _choices(results: Sequence[Result]) -> list[str]:
    """The names of the choices in the settings, the usual ones first; the protocol and transform last."""
    names = dict.fromkeys(name for result in results for name in choices_of(result.settings))
    return [*(name for name in CHOICES if name in names), *(n for n in names if n not in CHOICES), *_LAST]


def _facts_of(result: Result) -> dict[str, str]:
    """The settings of one number or word each, the protocol and the transform, in words."""
    scalars = {n: value for n, value in result.settings.items() if not isinstance(value, list | dict)}
    found = {n: f"{value:.4g}" if isinstance(value, float) else str(value) for n, value in scalars.items()}
    return {**found, "protocol": result.protocol, "transform": result.transform}


def _kinds(facts: Sequence[Mapping[str, str]], owners: Sequence[Any], names: Sequence[str]) -> int:
    """How many results there are that differ in their owner or in these facts."""
    pairs = zip(facts, owners, strict=True)
    return len({(owner, *(fact.get(name) for name in names)) for fact, owner in pairs})
