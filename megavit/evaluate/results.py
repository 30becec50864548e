"""What an evaluation found, always in the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


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
