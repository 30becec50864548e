"""Why a model decided so about one image: the record of all that was found out.

Letters: S image side, C channels, D width, K classes, L blocks, h rows and w columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from megavit.explain.faithfulness import BEST_RANDOM, CENTRED, RANDOM
from megavit.explain.methods import METHODS
from megavit.explain.path import BlockPath
from megavit.explain.provenance import TrainingImage
from megavit.explain.tokens import HIGH, MOST_ON_HIGH

FORMAT = 1
TOP = 5  # classes that are named


class ClassOf(NamedTuple):
    """A class of the model, and what the model says of it."""

    number: int
    name: str
    logit: float
    probability: float


class Judged(NamedTuple):
    """How faithful one map is, see `faithfulness.Faithfulness`."""

    insertion: float
    deletion: float
    saco: float

    @property
    def between(self) -> float:
        return self.insertion - self.deletion


class Sums(NamedTuple):
    """The sum of a map's values, and the score's difference from the baseline's, which it is to be."""

    total: float
    difference: float

    @property
    def residual(self) -> float:
        return self.difference - self.total


class Shown(NamedTuple):
    """A training image with its picture, uint8 [S, S, C]."""

    image: TrainingImage
    picture: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """What `megavit.explain` finds out about one image. All tensors are on the CPU.

    Args:
        name: file of the image, or what else it is called.
        pixels: the image as the model sees it, cropped and resized: uint8 [S, S, C].
        label: name of its true class; "" if nobody says.
        features: what the classifier reads, float32 [D].
        logits: float32 [K].
        probabilities: float32 [K], by softmax or sigmoid as the model was trained.
        target: the class that is explained.
        against: the class that it is held against, if it is.
        maps: by method, float32 [h, w], one value a patch.
        faithfulness: of each map by method, and beside them of what has not seen the model: random maps, the
            best of these, a centred Gaussian. Empty if it was not measured.
        sums: of the maps that are to add up.
        path: block by block; rows are of one image, as in `BlockPath` without B.
        high_norms: before the first block and after each, the share of patches whose token has a high norm,
            float32 [L + 1], see `tokens.HighNorms`.
        on_high_norms: by method how many of the patches at the map's top are such ones after the last block.
        training: training images by what they are to the decision: similar, helpful, harmful.
        provenance: what one needs to know to repeat it: digests, settings, versions.
    """

    name: str
    pixels: np.ndarray
    label: str
    features: Tensor
    logits: Tensor
    probabilities: Tensor
    names: tuple[str, ...] = field(repr=False)
    target: ClassOf
    against: ClassOf | None
    maps: Mapping[str, Tensor]
    faithfulness: Mapping[str, Judged]
    sums: Mapping[str, Sums]
    path: BlockPath
    high_norms: Tensor
    on_high_norms: Mapping[str, float]
    training: Mapping[str, Sequence[Shown]]
    provenance: Mapping[str, Any]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.maps)

    @property
    def question(self) -> str:
        """What is explained, in words: "why cat", "why cat rather than dog"."""
        return f"why {self.target.name}" + (f" rather than {self.against.name}" if self.against else "")

    def top(self, k: int = TOP) -> list[ClassOf]:
        """The k likeliest classes, best first."""
        order = self.logits.argsort(descending=True, stable=True)[:k].tolist()
        return [class_of(number, self.names, self.logits, self.probabilities) for number in order]

    def verdict(self, method: str) -> str:
        """Whether the map of a method is right for this image, in words, by insertion less deletion; "" if it
        was not measured."""
        if method not in self.maps or not self.faithfulness:
            return ""
        between = self.faithfulness[method].between
        if between <= self.faithfulness[RANDOM].between:
            return "no better than a random map: it does not show why the model decided so"
        if between <= self.faithfulness[BEST_RANDOM].between:
            return "better than random maps on average, but one of them did as well: weak evidence"
        if between <= self.faithfulness[CENTRED].between:
            return "better than random maps, but no better than a blob in the middle"
        return "better than random maps and than a blob in the middle"

    @property
    def warnings(self) -> list[str]:
        """What a reader of the maps must know, one sentence each."""
        found = []
        for method in self.methods:
            verdict = self.verdict(method)
            if verdict.startswith("no better"):
                found.append(f"The map {method} is {verdict}.")
            if self.on_high_norms[method] > MOST_ON_HIGH:
                found.append(
                    f"{self.on_high_norms[method]:.0%} of the top of the map {method} lies on tokens whose "
                    f"norm is more than {HIGH:g} times the median: there the model may keep what it knows "
                    f"of the whole image."
                )
            if not METHODS[method].is_specific:
                found.append(f"The map {method} is the same for every class: it does not say why this one.")
        return found

    def as_json(self) -> dict[str, Any]:
        """All but the maps and the pictures, as JSON has it."""
        methods = {
            name: {
                "about": METHODS[name].about,
                "signed": METHODS[name].signed,
                "specific_to_the_class": METHODS[name].is_specific,
                "faithfulness": _judged(self.faithfulness.get(name)),
                "verdict": self.verdict(name) or None,
                "sum": _summed(self.sums.get(name)),
                "top_on_high_norms": self.on_high_norms[name],
            }
            for name in self.methods
        }
        controls = {k: _judged(v) for k, v in self.faithfulness.items() if k not in self.maps}
        training = {kind: [asdict(one.image) for one in shown] for kind, shown in self.training.items()}
        return {
            "format": FORMAT,
            "name": self.name,
            "question": self.question,
            "label": self.label or None,
            "target": self.target._asdict(),
            "against": self.against._asdict() if self.against else None,
            "top": [found._asdict() for found in self.top()],
            "warnings": self.warnings,
            "methods": methods,
            "controls": controls,
            "high_norms": self.high_norms.tolist(),
            "path": {name: values.tolist() for name, values in self.path._asdict().items()},
            "training": training,
            "provenance": dict(self.provenance),
        }


def class_of(number: int, names: Sequence[str], logits: Tensor, probabilities: Tensor) -> ClassOf:
    return ClassOf(number, names[number], float(logits[number]), float(probabilities[number]))


def _judged(found: Judged | None) -> dict[str, float] | None:
    return None if found is None else found._asdict() | {"insertion_less_deletion": found.between}


def _summed(found: Sums | None) -> dict[str, float] | None:
    return None if found is None else found._asdict() | {"residual": found.residual}
