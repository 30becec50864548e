"""What an evaluation found, always in the same shape."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from megavit.fields import as_type, shown


class Count(NamedTuple):
    """Images: `given` by the set, `used` for the number, `bad` (could not be read). An image that was left
    out for another reason (ReaL: without a label) is neither used nor bad."""

    given: int
    used: int
    bad: int


@dataclass(frozen=True)
class Measurement:
    """One number, as a protocol yields it.

    Args:
        metric: its name, e.g. top1, mce, ece, auroc_msp.
        value: as a share, not in percent (mCE: 1.0 is AlexNet's).
        count: the images that it rests on.
        stderr: standard error, binomial or by bootstrap; None where there is none to be had.
        higher_is_better: which way is up.
        settings: of the protocol, the chosen ones too: {"k": 20, "layer": "pooled"}.
        data: the set that was measured, where it is not the task's own.
    """

    metric: str
    value: float
    count: Count
    stderr: float | None = None
    higher_is_better: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""


def now() -> str:
    """The time in UTC, as ISO 8601 has it, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Result(Measurement):
    """A measurement with all that one needs to know to judge and to repeat it: a row of `results.json`.

    Its settings are as JSON has them: lists, tables by name, text, numbers; numbers that are not finite are
    the words nan, inf and -inf.

    Args:
        task: as `--tasks` names it.
        model: what tables call the model: the run folder, the export, timm:NAME.
        protocol: how it was measured, in a few words, e.g. linear probe by LBFGS.
        checkpoint_digest: of the weights.
        data_digest: of the images that were given, in their order.
        transform: what was done to an image before the model saw it.
        limit: the images of a set at most, of a trial (`--limit`); None if all took part.
        versions: of the packages that took part, by name; see `versions`.
        device: name of the GPU or processor.
        dp_size: data-parallel ranks.
        tp_size: tensor-parallel ranks.
        seconds: that the whole task took, with all its measurements.
        date: when it was measured, in UTC, as ISO 8601 has it.
    """

    task: str
    model: str
    protocol: str
    checkpoint_digest: str
    data_digest: str
    transform: str
    limit: int | None = None
    versions: Mapping[str, str]
    device: str
    dp_size: int = 1
    tp_size: int = 1
    seconds: float
    date: str = field(default_factory=now)

    def __post_init__(self) -> None:
        change = object.__setattr__  # of a frozen dataclass, while it is made
        change(self, "value", float(self.value))
        change(self, "stderr", None if self.stderr is None else float(self.stderr))
        change(self, "settings", {str(name): _plain(value) for name, value in self.settings.items()})

    @classmethod
    def of(cls, measurement: Measurement, *, data: str, **facts: Any) -> Result:
        """A measurement with its facts. `data` is the task's own set: the measurement's own name of a set
        goes first."""
        found = {item.name: getattr(measurement, item.name) for item in dataclasses.fields(Measurement)}
        return cls(**{**found, "data": measurement.data or data}, **facts)

    def as_json(self) -> dict[str, Any]:
        """In the order in which people read it."""
        row = {name: _plain(getattr(self, name)) for name in _READ if name != "n"}
        return {name: self.count._asdict() if name == "n" else row[name] for name in _READ}

    @classmethod
    def from_json(cls, row: Any) -> Result:
        """ValueError, which says what is wrong, unless `row` is what `as_json` makes."""
        if not isinstance(row, dict):
            raise ValueError(f"must be an object, got {shown(row)}")
        if missing := [name for name in _READ if name not in row]:
            raise ValueError(f"lacks {', '.join(missing)}")
        read = {name: _read(name, row[name], hint) for name, hint in _READ.items()}
        counts = read.pop("n")
        count = Count(*(_read(f"n.{name}", counts.get(name), int) for name in Count._fields))
        return cls(count=count, **read)


@dataclass(frozen=True)
class Skipped:
    """A task, or one of its sets, that was not measured since something that it needs is not there.

    Args:
        task: as `--tasks` names it.
        reason: what is missing, where it was expected, and where to obtain it.
        data: the set, where only one of several was skipped.
        model: what tables call the model.
    """

    task: str
    reason: str
    data: str = ""
    model: str = ""


@dataclass(frozen=True)
class Failed:
    """A task, or one of its sets, that ended in an error.

    Args:
        task: as `--tasks` names it.
        error: its message.
        data: the set, where only one of several failed.
        model: what tables call the model.
    """

    task: str
    error: str
    data: str = ""
    model: str = ""


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, of Python, and the checkout's commit."""
    from megavit.train.logging.environment import checkout_commit, package_version

    packages = ("megavit", "torch", "torchvision", "numpy", "torchmetrics")
    found = {name: package_version(name) for name in packages}
    return {**found, "python": sys.version.split()[0], "commit": checkout_commit()}


# The keys of a row, in order, and what their values are. A float may be a word: nan, inf, -inf.
_READ: dict[str, Any] = {
    **dict.fromkeys(("task", "data", "model", "metric"), str),
    "value": float,
    "stderr": float | None,
    "higher_is_better": bool,
    "n": dict,
    "protocol": str,
    "settings": dict,
    "limit": int | None,
    **dict.fromkeys(("transform", "checkpoint_digest", "data_digest"), str),
    "versions": dict,
    "device": str,
    **dict.fromkeys(("dp_size", "tp_size"), int),
    "seconds": float,
    "date": str,
}


def _read(name: str, value: Any, hint: Any) -> Any:
    """ValueError that names the key unless `value` is a `hint`."""
    if hint in (float, float | None) and value in ("nan", "inf", "-inf"):
        return float(value)
    try:
        return as_type(value, hint)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def _plain(value: Any) -> Any:
    """`value` as strict JSON can have it; what JSON has no form for becomes its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):  # arrays and tensors
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value)
