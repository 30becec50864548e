"""Observers of a model: objects that are told of its attention and token states while it runs.

The model calls them and keeps nothing. Everything that they are given is part of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Observers:
    """The observers of one model, in the order in which they joined. Each has some of the methods that
    `MegaVit.observe` describes."""

    def __init__(self) -> None:
        self._active: list[Any] = []

    @contextmanager
    def joined_by(self, observer: Any) -> Iterator[Any]:
        self._active.append(observer)
        try:
            yield observer
        finally:
            last = max(i for i, other in enumerate(self._active) if other is observer)
            del self._active[last]

    def __bool__(self) -> bool:
        return bool(self._active)

    def listener(self, method: str, *arguments: Any) -> Callable[..., None] | None:
        """What passes tensors on, as `observer.method(*arguments, *tensors)`; None if no observer has it."""
        calls = [getattr(observer, method) for observer in self._active if hasattr(observer, method)]
        if not calls:
            return None

        def tell(*seen: Tensor) -> None:
            for call in calls:
                call(*arguments, *seen)

        return tell

    def listeners(self, methods: Sequence[str], layer: int) -> dict[str, Callable[..., None]] | None:
        """Those of the `methods` that some observer has; None if there are none."""
        found = {method: self.listener(method, layer) for method in methods} if self._active else {}
        return {method: tell for method, tell in found.items() if tell is not None} or None

    def tell(self, method: str, *arguments: Any) -> None:
        """Call `observer.method(*arguments)` of the observers that have it."""
        for observer in self._active:
            if hasattr(observer, method):
                getattr(observer, method)(*arguments)


def require_grad(x: Tensor) -> Tensor:
    """`x`, which now requires a gradient if gradients are recorded: with frozen weights nothing in front of
    it may."""
    return x.requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x
