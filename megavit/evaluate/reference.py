"""Published numbers to set beside one's own, each with how sure it is.

`confirmed`: read where its authors print it, in quotes of their text, or alike in three other papers.
`second-hand`: printed by others. `unverified`: recalled from the ViT-22B paper (arXiv 2302.05442), and not
seen in print. Values are shares, or in the units of their metric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from megavit.evaluate.results import Result


class Mark(StrEnum):
    """How sure a published number is."""

    CONFIRMED = "confirmed"
    SECOND_HAND = "second-hand"
    UNVERIFIED = "unverified"


class Reference(NamedTuple):
    """A published number.

    `heading` is the model, with the protocol where the row that it stands beside does not say it.
    `same_protocol` is False where it was not measured as that row was.
    """

    model: str
    protocol: str
    value: float
    mark: Mark
    source: str
    heading: str
    same_protocol: bool


class _Row(NamedTuple):
    """Numbers of one model by one protocol: the values by (set, metric), where a bare set means top1, and a
    set "" any."""

    model: str
    protocol: str
    mark: Mark
    source: str
    values: Mapping[str | tuple[str, str], float]


_LINEAR, _KNN, _LIT, _ZERO_SHOT = "linear probe", "kNN", "LiT zero-shot", "zero-shot"
_TUNED, _HUMAN = "fine-tuned", "model-vs-human"
_SEGMENT, _UPERNET, _UPERNET_TUNED = "frozen, linear decoder", "frozen, UPerNet", "UPerNet, all tuned"
_DPT, _DEPTH, _VIDEO = "frozen, DPT", "frozen, linear readout", "frozen frames, temporal transformer"
_INTERNVL = "InternVL's paper, table 4"
_PAPER = "memory of the ViT-22B paper"
_BENCHMARK = "model-vs-human's README"


def _depth(mse: float, abs_rel: float, *within: float) -> dict[str | tuple[str, str], float]:
    metrics = ("mse", "abs_rel", "delta1.1", "delta1", "delta2")
    return {("waymo", name): value for name, value in zip(metrics, (mse, abs_rel, *within), strict=True)}


def _human(**values: float) -> dict[str | tuple[str, str], float]:
    return {("", name): value for name, value in values.items()}


# fmt: off
_PUBLISHED = (
    _Row("ViT-22B", _LINEAR, Mark.SECOND_HAND, _INTERNVL,
         {"imagenet": .895, "imagenet-real": .909, "imagenet-v2": .832, "imagenet-a": .838}),
    _Row("ViT-22B", _LINEAR, Mark.SECOND_HAND, f"{_INTERNVL} (imagenet-r: remembered otherwise)",
         {"imagenet-r": .874}),
    _Row("ViT-22B", _LINEAR, Mark.UNVERIFIED, _PAPER, {"objectnet": .743}),
    _Row("ViT-e/14", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .893}),
    _Row("ViT-G/14", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .890}),
    _Row("ViT-g/14", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .885}),
    _Row("ViT-L/16", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .867}),
    _Row("ViT-B/16", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .842}),
    _Row("ViT-B/32", _LINEAR, Mark.UNVERIFIED, _PAPER, {"imagenet": .802}),
    _Row("InternViT-6B", _LINEAR, Mark.CONFIRMED, "InternVL's linear_probing",
         {"imagenet": .882, "imagenet-real": .904, "imagenet-v2": .799, "imagenet-a": .775,
          "imagenet-r": .898, "imagenet-sketch": .691}),
    _Row("DINOv3 ViT-L, fast recipe", _LINEAR, Mark.CONFIRMED, "dinov3's README", {"imagenet": .835}),
    _Row("DINOv3 ViT-L, fast recipe", _KNN, Mark.CONFIRMED, "dinov3's README", {"imagenet": .820}),
    _Row("ViT-22B", _LIT, Mark.CONFIRMED, "the papers of Perception Encoder and InternVL, Papers with Code",
         {"imagenet": .859, "imagenet-v2": .809, "objectnet": .876, "imagenet-a": .901, "imagenet-r": .960}),
    _Row("ViT-22B", _LIT, Mark.UNVERIFIED, _PAPER, {"imagenet-real": .886}),
    _Row("ViT-e", _LIT, Mark.UNVERIFIED, _PAPER,
         {"imagenet": .854, "imagenet-v2": .806, "imagenet-r": .961, "imagenet-a": .880, "objectnet": .849}),
    _Row("ViT-g", _LIT, Mark.UNVERIFIED, _PAPER,
         {"imagenet": .852, "imagenet-v2": .798, "imagenet-r": .949, "imagenet-a": .818, "objectnet": .825}),
    _Row("PE-G", _ZERO_SHOT, Mark.CONFIRMED, "perception_models' apps/pe/README",
         {"imagenet": .854, "imagenet-v2": .802, "imagenet-a": .926, "objectnet": .882,
          "kinetics-400": .769}),
    _Row("EVA-02-L/14 at 448", _TUNED, Mark.CONFIRMED, "timm's results",
         {"imagenet": .9006, "imagenet-a": .8863}),
    _Row("timm vit_pwee_patch16_reg1_gap_256", _TUNED, Mark.CONFIRMED, "timm's results-imagenet.csv",
         {"imagenet": .80082, ("imagenet", "top5"): .95138}),
    _Row("ViT-B/16 distilled from ViT-22B", _TUNED, Mark.SECOND_HAND, "Papers with Code", {"imagenet": .886}),
    _Row("ViT-L/16 at 384 distilled from ViT-22B", _TUNED, Mark.SECOND_HAND, "Papers with Code",
         {"imagenet": .896}),
    _Row("AlexNet", _TUNED, Mark.CONFIRMED, "ImageNet-C's norm; torchvision",
         {"imagenet": .56522, ("imagenet-c", "mce"): 1.0, ("imagenet-c", "relative_mce"): 1.0}),
    _Row("ViT-22B at 224", _HUMAN, Mark.CONFIRMED, _BENCHMARK, _human(ood_accuracy=.837)),
    _Row("ViT-22B at 384", _HUMAN, Mark.CONFIRMED, _BENCHMARK,
         _human(ood_accuracy=.798, accuracy_difference=.018, observed_consistency=.783,
                error_consistency=.258)),
    _Row("ViT-22B at 384", _HUMAN, Mark.CONFIRMED, "quotes of the ViT-22B paper", _human(shape_bias=.87)),
    _Row("ViT-22B at 560", _HUMAN, Mark.CONFIRMED, _BENCHMARK,
         _human(accuracy_difference=.022, observed_consistency=.739, error_consistency=.281)),
    _Row("ResNet-50", _HUMAN, Mark.CONFIRMED, _BENCHMARK,
         _human(ood_accuracy=.559, accuracy_difference=.087, observed_consistency=.665,
                error_consistency=.208)),
    _Row("humans", _HUMAN, Mark.CONFIRMED, "quotes of the ViT-22B paper", _human(shape_bias=.96)),
    _Row("OpenCLIP ViT-H/14", _HUMAN, Mark.SECOND_HAND, "a note on shape bias", _human(shape_bias=.60)),
    _Row("ViT-22B", _SEGMENT, Mark.SECOND_HAND, _INTERNVL, {("ade20k", "miou"): .346}),
    _Row("ViT-22B", _UPERNET, Mark.SECOND_HAND, _INTERNVL, {("ade20k", "miou"): .527}),
    _Row("ViT-22B", _UPERNET_TUNED, Mark.SECOND_HAND, _INTERNVL, {("ade20k", "miou"): .553}),
    _Row("InternViT-6B", _SEGMENT, Mark.CONFIRMED, "InternVL's configs", {("ade20k", "miou"): .472}),
    _Row("InternViT-6B", _UPERNET, Mark.CONFIRMED, "InternVL's configs", {("ade20k", "miou"): .549}),
    _Row("InternViT-6B", _UPERNET_TUNED, Mark.CONFIRMED, "InternVL's configs", {("ade20k", "miou"): .589}),
    _Row("DINOv3 7B", _SEGMENT, Mark.SECOND_HAND, "dinov3's issue 300", {("ade20k", "miou"): .559}),
    _Row("PE spatial G", _SEGMENT, Mark.CONFIRMED, "perception_models' apps/pe/README",
         {("ade20k", "miou"): .493}),
    _Row("ViT-22B", _DPT, Mark.UNVERIFIED, _PAPER, _depth(.021, .095, .702, .909, .979)),
    _Row("ViT-e", _DPT, Mark.UNVERIFIED, _PAPER, _depth(.024, .112, .631, .888, .975)),
    _Row("ViT-L", _DPT, Mark.UNVERIFIED, _PAPER, _depth(.027, .121, .594, .871, .972)),
    _Row("ViT-22B", _DEPTH, Mark.UNVERIFIED, _PAPER, _depth(.039, .166, .412, .779, .960)),
    _Row("ViT-e", _DEPTH, Mark.UNVERIFIED, _PAPER, _depth(.053, .204, .332, .687, .938)),
    _Row("ViT-L", _DEPTH, Mark.UNVERIFIED, _PAPER, _depth(.060, .222, .304, .652, .926)),
    _Row("ViT-22B", _VIDEO, Mark.SECOND_HAND, "Papers with Code", {"kinetics-400": .880}),
    _Row("ViT-22B", _VIDEO, Mark.UNVERIFIED, _PAPER, {"moments-in-time": .449}),
    _Row("ViT-e", _VIDEO, Mark.UNVERIFIED, _PAPER, {"kinetics-400": .865, "moments-in-time": .436}),
)
# fmt: on

# What a published protocol may stand beside: own results by these protocols, of which the first is the same.
# Protocols that are not here speak for themselves in their heading.
_BESIDE = {
    _LINEAR: ("linear",),
    _KNN: ("knn",),
    _LIT: ("zeroshot", "head"),
    _ZERO_SHOT: ("zeroshot", "head"),
    _TUNED: ("head",),
}
_ALIASES = {
    "imagenet1k": "imagenet",
    "imagenetval": "imagenet",
    "imagenetv2matchedfrequency": "imagenetv2",
    "k400": "kinetics400",
}


def references_for(result: Result) -> list[Reference]:
    """The published numbers that are about the same set and metric, in a fixed order of models."""
    own, data = _protocol_of(result), _bare(result.data)
    found = []
    for row in _PUBLISHED:
        beside = _BESIDE.get(row.protocol, (own,))
        for place, value in row.values.items():
            name, metric = place if isinstance(place, tuple) else (place, "top1")
            if own in beside and metric == result.metric and _bare(name) in ("", data):
                same = own == beside[0]
                heading = row.model if same and row.protocol in _BESIDE else f"{row.model}, {row.protocol}"
                found.append(Reference(row.model, row.protocol, value, row.mark, row.source, heading, same))
    return found


def _protocol_of(result: Result) -> str:
    """linear, knn, fewshot, zeroshot, or head: the model's own classifier, in whatever the metric is."""
    for name in ("linear", "knn", "fewshot", "zeroshot"):
        if any(_bare(text).startswith(name) for text in (result.task, result.protocol)):
            return name
    return "head"


def _bare(name: str) -> str:
    """A name as it is compared: letters and digits, one spelling for a set."""
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    return _ALIASES.get(bare, bare)
