"""What the dense planes of samples hold, as statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megavit.data.plane_facts import PlaneFacts
from megavit.data.planes import PLANE_KINDS, known_pixels


def plane_members(members: Iterable[str]) -> list[str]:
    """The extensions of a sample's planes: `depth.png`, but not `png`, which is its picture."""
    return [name for name in members if "." in name and name.rpartition(".")[2] in PLANE_KINDS]


def name_of_plane(extension: str) -> str:
    """What `dense.json` calls the plane of a member: `depth` of `depth.png`."""
    return extension.rpartition(".")[0]


@dataclass
class PlaneCounts:
    """What the planes of one name hold, over samples; numbers as they are stored."""

    files: int = 0
    pixels: int = 0
    known: int = 0
    smallest: float = float("inf")
    largest: float = float("-inf")
    classes: Counter[int] = field(default_factory=Counter)  # of masks: class -> files

    def look(self, values: np.ndarray, facts: PlaneFacts) -> None:
        """Count a plane [H, W, C] of which something is known."""
        known = values[known_pixels(values, facts.invalid)]
        self.files += 1
        self.pixels += values.size
        self.known += known.size
        self.smallest = min(self.smallest, float(known.min()))
        self.largest = max(self.largest, float(known.max()))
        if facts.classes is not None:
            self.classes.update(np.unique(known).astype(int).tolist())

    def add(self, other: PlaneCounts) -> None:
        """Take in another part's counts."""
        for name in ("files", "pixels", "known"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.classes.update(other.classes)

    def lines(self, extension: str, facts: PlaneFacts) -> list[str]:
        """The counts as text, a line each."""
        share = f"{self.known / (self.pixels or 1):.1%} of the pixels known"
        text = f"{extension:<15} {self.files:,} files, {share}"
        if self.known and facts.classes is None:
            unit = f" (times {facts.scale:g})" if facts.scale != 1 else ""
            low, high = self.smallest * facts.scale, self.largest * facts.scale
            text += f", min {low:g}, max {high:g}{unit}"
        if facts.classes is None or not self.classes:
            return [text]
        absent = sorted(set(range(facts.classes)) - self.classes.keys())
        some = f": {', '.join(map(str, absent[:10]))}{', ...' if len(absent) > 10 else ''}" if absent else ""
        return [
            text,
            f"  classes       {facts.classes - len(absent):,} of {facts.classes:,} are there, ids "
            f"{min(self.classes)} to {max(self.classes)}; absent {len(absent):,}{some}",
        ]
