"""Which weights ZeRO-3 gathers, when, and how many are whole at once: its rules, replayed on sizes alone.

DeepSpeed 0.19 fetches a module's weights before it runs, prefetches what comes next, and releases them after,
unless they come again within a distance or have been passed over by the prefetcher as already there. Those
rules decide how often a weight is gathered a step (once or twice) and are not worth a formula.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megavit.scale.inventory import Unit


@dataclass(frozen=True)
class GatherLimits:
    """The keys of `zero_optimization` that decide, in elements; the defaults are DeepSpeed's."""

    persistence: int = 100_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000


class Moment(NamedTuple):
    """While one module runs: elements of whole weights on this rank and of buffers that their gathers still
    hold. `peak` is the most since the last moment."""

    unit: Unit
    backward: bool
    live: int
    peak: int


@dataclass(frozen=True)
class GatherTrace:
    """One micro-step in the steady state. `gathered` counts the elements of the gathers' results, padding
    included, `gathered_forward` those of them that begin in the forward pass; `padded_persistent` those of
    the weights that stay whole, which are gathered once after each update."""

    moments: tuple[Moment, ...]
    gathered: int
    gathered_forward: int
    padded_persistent: int


class _Weight:
    """One parameter; `gather` is the one that it came with, until a module asks for it."""

    def __init__(self, size: int, ranks: int, persistence: int):
        self.size, self.padded = size, math.ceil(size / ranks) * ranks
        self.persists = size <= persistence
        self.available = self.persists
        self.gather: _Gather | None = None
        self.passed_for = -1  # last step of the order for which the prefetcher has seen it


class _Gather:
    """One all-gather into one flat buffer. All its weights are copied out when the first of them is asked
    for; DeepSpeed drops the buffer when the last one has been."""

    def __init__(self, weights: list[_Weight]):
        self.weights = weights
        self.asked_for = 0
        self.padded = sum(weight.padded for weight in weights)
        self.size = sum(weight.size for weight in weights)


class _Module:
    """A unit and its weights; `known` are those of modules that are called several times, by name."""

    def __init__(self, unit: Unit, ranks: int, persistence: int, known: dict[str, list[_Weight]]):
        self.unit = unit
        self.own = [_Weight(size, ranks, persistence) for size in unit.sizes]
        if unit.call >= 0:
            self.own = known.setdefault(unit.name, self.own)
        self.children: list[_Module] = [_Module(child, ranks, persistence, known) for child in unit.children]
        self.below: list[_Weight] = self.own + [weight for child in self.children for weight in child.below]

    def visited(self, *, backward: bool) -> list[_Module]:
        """The children in the order in which a pass runs them."""
        if not backward:
            return self.children
        return [child for child in reversed(self.children) if child.unit.has_backward]


@functools.lru_cache(maxsize=1024)
def replay(model: Unit, ranks: int, limits: GatherLimits) -> GatherTrace:
    """The gathers of one forward and backward pass of `model`, sharded over `ranks` data-parallel ranks. With
    one rank they are copies of what waits in host memory, without a buffer in between. The backward pass
    visits only what it reaches; frozen weights are gathered like others."""
    root = _Module(model, ranks, limits.persistence, {})
    replayed = _Replay(root, limits, buffered=ranks > 1)
    replayed.run()
    return GatherTrace(
        tuple(replayed.moments),
        replayed.gathered,
        replayed.gathered_forward,
        persistent_elements(model, ranks, limits),
    )


def persistent_elements(model: Unit, ranks: int, limits: GatherLimits) -> int:
    """Those of the weights that stay whole, with the padding of their gathers."""
    small = [size for size in model.all_sizes if size <= limits.persistence]
    return sum(math.ceil(size / ranks) * ranks for size in small)


class _Replay:
    def __init__(self, root: _Module, limits: GatherLimits, *, buffered: bool):
        self.root, self.limits, self.buffered = root, limits, buffered
        self.order: list[_Module] = []
        self._append(root, backward=False)
        self._append(root, backward=True)
        self.queue = deque((weight, step) for step, module in enumerate(self.order) for weight in module.own)
        self.step = 0
        self.counted = 0  # what DeepSpeed takes for live
        self.live = self.peak = self.gathered = self.gathered_forward = 0
        self.moments: list[Moment] = []

    def _append(self, module: _Module, *, backward: bool) -> None:
        self.order.append(module)
        for child in module.visited(backward=backward):
            self._append(child, backward=backward)

    def run(self) -> None:
        self._visit(self.root, backward=False)
        self.gathered_forward = self.gathered
        self._visit(self.root, backward=True)

    def _visit(self, module: _Module, *, backward: bool) -> None:
        self._fetch(module)
        self.moments.append(Moment(module.unit, backward, self.live, self.peak))
        self.peak = self.live
        for child in module.visited(backward=backward):
            self._visit(child, backward=backward)
        self._release(module)

    def _fetch(self, module: _Module) -> None:
        wanted = module.own
        self._gather([weight for weight in wanted if not weight.available and weight.gather is None])
        for weight in wanted:
            self._wait(weight)
        new = sum(weight.passed_for < self.step for weight in wanted)
        for _ in range(new):
            weight, step = self.queue.popleft()
            weight.passed_for = step
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        room = min(self.limits.max_live - self.counted, self.limits.prefetch)
        chosen: list[_Weight] = []
        size = 0
        while self.queue and size < room:
            weight, step = self.queue.popleft()
            weight.passed_for = max(weight.passed_for, step)
            if not weight.available and weight.gather is None and weight not in chosen:
                chosen.append(weight)
                size += weight.size
        self._gather(chosen)

    def _gather(self, weights: list[_Weight]) -> None:
        if not weights:
            return
        gather = _Gather(weights)
        for weight in weights:
            weight.gather = gather
        self.counted += gather.size
        self.gathered += gather.padded
        self._hold(gather.padded)

    def _wait(self, weight: _Weight) -> None:
        gather, weight.gather = weight.gather, None
        if gather is None:
            return
        if not gather.asked_for:
            if self.buffered:
                self._hold(gather.size)
            for other in gather.weights:
                other.available = True
        gather.asked_for += 1
        if self.buffered and gather.asked_for == len(gather.weights):
            self.live -= gather.padded

    def _hold(self, elements: int) -> None:
        self.live += elements
        self.peak = max(self.peak, self.live)

    def _release(self, module: _Module) -> None:
        kept = {id(weight) for weight in module.own if weight.persists or weight.passed_for > self.step}
        passed = 0
        for following in self.order[self.step :]:
            if passed >= self.limits.max_reuse:
                break
            # For any other module, DeepSpeed sees of a block that follows what is its very own: nothing.
            seen = [] if following.unit.is_block else following.own
            for weight in following.below if module.unit.is_block else seen:
                kept.add(id(weight))
                passed += weight.size
        for weight in module.own:
            if id(weight) not in kept and weight.available:
                weight.available = False
                self.live -= weight.size
                self.counted -= weight.size
