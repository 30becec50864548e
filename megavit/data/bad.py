"""Samples that cannot be used: recorded, counted and limited, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

BAD_SAMPLES_FILE = "bad_samples.jsonl"
_FREE = 10  # a rate means nothing before some samples have been seen


class BadSample(NamedTuple):
    """A slot of a batch that got weight 0; `whole_shard` if the shard itself could not be had or opened.
    `source` is the file that the sample was made from, where its shard tells."""

    url: str
    key: str
    reason: str
    whole_shard: bool = False
    source: str = ""


class SampleError(ValueError):
    """A sample cannot be used; the message names shard, key and reason."""

    def __init__(self, bad: BadSample):
        super().__init__(bad)  # the one argument that pickling hands back
        self.bad = bad

    def __str__(self) -> str:
        source = f" (made from {self.bad.source!r})" if self.bad.source else ""
        return f"{self.bad.url}: sample {self.bad.key!r}: {self.bad.reason}{source}"


class TooManyBadSamples(ValueError):
    """The run's data are worse than its limits allow; the message names the worst shards."""


class BadSamples:
    """The run's account of bad samples, kept alike on every rank; only one rank has a `write`, which takes
    the fields of a record.

    Limits: `max_fraction` of the samples seen, each counted once however often it was read (the first ten are
    free, unless it is 0), and `max_shards` different shards that failed as a whole without one step in
    between that read everything. `num_samples` are in the set; an epoch reads each once.

    Memory and checkpoint: the keys of the bad samples.
    """

    def __init__(
        self,
        max_fraction: float,
        max_shards: int,
        num_samples: int,
        write: Callable[..., None] | None = None,
        state: dict[str, Any] | None = None,
    ):
        state = state or {}
        self.total: int = state.get("total", 0)  # over all epochs
        self._max_fraction, self._max_shards = max_fraction, max_shards
        self._num_samples, self._write = num_samples, write
        self._read: int = state.get("seen", 0)
        # Absent from the checkpoints of earlier versions, which did not know which samples they had counted.
        self._keys: dict[str, set[str]] = {url: set(keys) for url, keys in state.get("keys", {}).items()}
        self._failing: dict[str, str] = state.get("failing", {})  # of the current streak, with the reason

    def state(self) -> dict[str, Any]:
        """The account, for a checkpoint (JSON); hand it to a new `BadSamples` to go on with it."""
        return {
            "total": self.total,
            "seen": self._read,
            "keys": {url: sorted(keys) for url, keys in self._keys.items()},
            "failing": self._failing,
        }

    def add(self, step: int, batch_size: int, found: list[BadSample]) -> None:
        """Account for a step's batch. Raises TooManyBadSamples above a limit, after writing the records."""
        self._read += batch_size
        self.total += len(found)
        for bad in found:
            self._keys.setdefault(bad.url, set()).add(bad.key)
        self.record(step, found)
        failing = {bad.url: bad.reason for bad in found if bad.whole_shard}
        self._failing = self._failing | failing if failing else {}
        self._check(step)

    def record(self, step: int, found: list[BadSample]) -> None:
        """Write records without counting them, as for validation samples."""
        if self._write:
            for bad in found:
                known = {name: value for name, value in bad._asdict().items() if name != "source" or value}
                self._write(step=step, **known)

    def _check(self, step: int) -> None:
        if len(self._failing) > self._max_shards:
            raise TooManyBadSamples(
                f"{len(self._failing)} shards could not be read in the steps up to {step}, more than "
                f"--data.max_bad_shards {self._max_shards}: {_some(self._failing)}"
            )
        seen = min(self._read, self._num_samples)
        bad = sum(map(len, self._keys.values()))
        if bad > (max(self._max_fraction * seen, _FREE) if self._max_fraction else 0):
            most_first = sorted(self._keys.items(), key=lambda item: -len(item[1]))
            worst = {url: f"{len(keys)} samples" for url, keys in most_first}
            raise TooManyBadSamples(
                f"{bad} of {seen} samples up to step {step} are unusable, more than "
                f"--data.max_bad_fraction {self._max_fraction:g}; see {BAD_SAMPLES_FILE}; by shard: "
                f"{_some(worst)}"
            )


def _some(named: dict[str, str], most: int = 5) -> str:
    lines = [f"{name} ({what})" for name, what in list(named.items())[:most]]
    return "; ".join(lines) + (f"; and {len(named) - most} more" if len(named) > most else "")
