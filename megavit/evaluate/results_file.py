"""`results.json`: the results of a folder, whole after every task."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megavit.evaluate.results import Failed, Result, Skipped
from megavit.fields import as_type, shown

RESULTS_FILE = "results.json"
# Settings by which one protocol gives several results, in the order in which people think of them.
CHOICES = ("layer", "k", "shots", "score", "corruption", "severity", "epochs", "views", "seed")
_FORMAT = 1
_FIX = "give the results.json that launch/evaluate.py --out DIR wrote"
_DAMAGED = "move the file away and evaluate again: features that are in the cache are not computed again"
_Entry = TypeVar("_Entry", Skipped, Failed)


@dataclass(frozen=True)
class Recorded:
    """What a results file holds."""

    results: tuple[Result, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    failed: tuple[Failed, ...] = ()

    def with_entries(self, *entries: Result | Skipped | Failed) -> Recorded:
        """With what a task has found, in the place of what is outdated by it.

        A result replaces those of the same task, set, metric, weights, protocol, transform and choices (see
        `choices_of`). A trial (`limit`) does not replace what all images gave. What was skipped or failed is
        forgotten once the same task has another outcome.
        """
        new = [entry for entry in entries if isinstance(entry, Result)]
        kept = [old for old in self.results if not any(_replaces(entry, old) for entry in new)]
        return Recorded(
            (*kept, *new),
            (*_still(self.skipped, entries), *(e for e in entries if isinstance(e, Skipped))),
            (*_still(self.failed, entries), *(e for e in entries if isinstance(e, Failed))),
        )


class ResultsFile:
    """`results.json` in a folder, for the one process that writes it (the main rank).

    ValueError if the file is there and damaged, OSError if it cannot be written: both at once, before
    anything is measured.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / RESULTS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.add()

    def read(self) -> Recorded:
        return read_results(self.path) if self.path.exists() else Recorded()

    def add(self, *entries: Result | Skipped | Failed) -> None:
        """Record what a task has found; see `Recorded.with_entries`. Whoever reads the file, also after a
        kill, finds the old content or the new."""
        text = as_text(self.read().with_entries(*entries))
        partial = self.path.with_name(f"{RESULTS_FILE}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_results(path: str | os.PathLike) -> Recorded:
    """The content of a results file, or of the one in a folder. ValueError or OSError, naming the file and
    what to do, unless it is a whole one."""
    path = Path(path)
    if path.is_dir():
        path /= RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {_FIX}")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no results file ({error}); {_DAMAGED}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f'{path} is no results file: it lacks "format"; {_FIX}')
    if content["format"] != _FORMAT:
        raise ValueError(
            f"{path} has format {shown(content['format'])}, and this megavit reads {_FORMAT}: "
            "use the megavit that wrote it, or a later one"
        )
    try:
        results = [_named(f"results[{i}]", Result.from_json, row) for i, row in _rows(content, "results")]
        skipped = [_named(f"skipped[{i}]", _skipped, row) for i, row in _rows(content, "skipped")]
        failed = [_named(f"failed[{i}]", _failed, row) for i, row in _rows(content, "failed")]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {_DAMAGED}") from None
    return Recorded(tuple(results), tuple(skipped), tuple(failed))


def as_text(recorded: Recorded) -> str:
    """Strict JSON, one key of a row a line; lists of numbers do not run over many lines."""
    lists = {
        "results": [result.as_json() for result in recorded.results],
        "skipped": [dataclasses.asdict(entry) for entry in recorded.skipped],
        "failed": [dataclasses.asdict(entry) for entry in recorded.failed],
    }
    parts = [f'  "format": {_FORMAT}', *(f'  "{name}": {_list_text(rows)}' for name, rows in lists.items())]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _list_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "[]"
    return "[\n" + ",\n".join(f"    {{\n{_row_text(row)}\n    }}" for row in rows) + "\n  ]"


def _row_text(row: Mapping[str, Any]) -> str:
    values = {name: json.dumps(value, allow_nan=False, ensure_ascii=False) for name, value in row.items()}
    return ",\n".join(f'      "{name}": {value}' for name, value in values.items())


def _replaces(new: Result, old: Result) -> bool:
    names = ("task", "data", "metric", "checkpoint_digest", "protocol", "transform")
    same = all(getattr(new, name) == getattr(old, name) for name in names)
    is_trial_of_whole = new.limit is not None and old.limit is None
    return same and not is_trial_of_whole and choices_of(new.settings) == choices_of(old.settings)


def choices_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that somebody chose: words, and the whole numbers named in `CHOICES`. Other numbers, flags
    and tables were found or follow from the data, and differ a little each time: the L2 chosen on held-out
    images, whether a fit converged, a curve."""
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, str) or (name in CHOICES and type(value) is int)
    }


def _still(old: tuple[_Entry, ...], new: tuple[Result | Skipped | Failed, ...]) -> list[_Entry]:
    """The entries that are not outdated by another outcome of the same task, set and model."""
    return [entry for entry in old if not any(_concerns(found, entry) for found in new)]


def _concerns(new: Result | Skipped | Failed, old: Skipped | Failed) -> bool:
    return new.task == old.task and old.model in ("", new.model) and old.data in ("", new.data)


def _rows(content: Mapping[str, Any], name: str) -> list[tuple[int, Any]]:
    rows = content.get(name)
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list, got {shown(rows)}")
    return list(enumerate(rows))


def _named(place: str, read: Any, row: Any) -> Any:
    try:
        return read(row)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from None


def _skipped(row: Any) -> Skipped:
    return Skipped(**_words(row, "task", "reason", "data", "model"))


def _failed(row: Any) -> Failed:
    return Failed(**_words(row, "task", "error", "data", "model"))


def _words(row: Any, *names: str) -> dict[str, str]:
    """The values of an object that holds text only."""
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {shown(row)}")
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"lacks {', '.join(missing)}")
    return {name: _named(name, lambda value: as_type(value, str), row[name]) for name in names}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
