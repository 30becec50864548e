"""Which updates are refused: gradients that are not finite, or far above what the run is used to."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megavit.train.config import GuardConfig

_WINDOW = 128  # accepted norms that the median is taken of
_ENOUGH = 32  # before, no norm is called unusual


class TooManySkipped(RuntimeError):
    """So many updates in a row were refused that the run cannot be left to itself; weights are unchanged."""


class Guard:
    """The limit on the gradient norm, and the account of refused updates. The same on every rank.

    Its state is a part of the checkpoint, so that a resumed run refuses what the uninterrupted one would.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None):
        state = state or {}
        self._config = config
        self._norms: deque[float] = deque(state.get("norms", ()), maxlen=_WINDOW)
        self.skipped: int = state.get("skipped", 0)
        in_a_row: int = state.get("in_a_row", 0)
        self.in_a_row = 0 if in_a_row >= config.max_skipped else in_a_row  # a person has looked since

    @property
    def limit(self) -> float:
        """The largest norm, before clipping, that the next update may have."""
        if not self._config.max_grad_norm_ratio or len(self._norms) < _ENOUGH:
            return math.inf
        return self._config.max_grad_norm_ratio * statistics.median(self._norms)

    def record(self, applied: bool, grad_norm: float) -> None:
        """Account for a step."""
        if applied:
            self._norms.append(grad_norm)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1

    @property
    def gives_up(self) -> bool:
        return self.in_a_row >= self._config.max_skipped

    @property
    def may_give_up(self) -> bool:
        """Whether one more refusal is one too many."""
        return self.in_a_row + 1 >= self._config.max_skipped

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "skipped": self.skipped, "in_a_row": self.in_a_row}
