"""All maps by name, and what each may be used for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from megavit.explain.attention import raw_attention, rollout
from megavit.explain.gradient import frozen, gradient, integrated_gradients
from megavit.explain.occlusion import occlusion
from megavit.explain.relevance import located, relevance
from megavit.explain.target import BLACK, Baseline, Target
from megavit.fields import nearest
from megavit.model.vit import MegaVit

NOT_SPECIFIC = "not specific to the class"


class Method(NamedTuple):
    """`compute(model, images, target, baseline, progress)` gives the maps, float32 [B, h, w], and shows a bar
    if it takes long and `progress` is true. `about` says in a few words what they are. The values of those
    that are `signed` speak for and against the target; the sum of those that `adds_up` is to be the score's
    difference from the baseline's, see `sum_check`."""

    compute: Callable[[MegaVit, Tensor, Target, Baseline, bool], Tensor]
    about: str
    signed: bool = False
    adds_up: bool = False
    is_specific: bool = True


METHODS = {
    "located": Method(
        lambda m, x, target, start, _: located(m, x, target, baseline=start),
        "relevance times evidence for the target",
    ),
    "frozen": Method(
        lambda m, x, target, start, _: frozen(m, x, target, baseline=start),
        "evidence for and against the target, by the gradient with frozen statistics",
        signed=True,
        adds_up=True,
    ),
    "relevance": Method(
        lambda m, x, target, *_: relevance(m, x, target),
        "gradient x attention through all blocks and the pooling",
    ),
    "occlusion": Method(
        lambda m, x, target, start, bar: occlusion(m, x, target, baseline=start, progress=bar),
        "fall of the score when the patch is covered",
        signed=True,
    ),
    "occlusion_3x3": Method(
        lambda m, x, target, start, bar: occlusion(m, x, target, baseline=start, window=3, progress=bar),
        "fall of the score when 3 x 3 patches are covered",
        signed=True,
    ),
    "integrated_gradients": Method(
        lambda m, x, target, start, _: integrated_gradients(m, x, target, baseline=start),
        "mean gradient on the way from the baseline",
        signed=True,
        adds_up=True,
    ),
    "gradient": Method(
        lambda m, x, target, start, _: gradient(m, x, target, baseline=start),
        "plain gradient x input",
        signed=True,
    ),
    "rollout": Method(
        lambda m, x, *_: rollout(m, x),
        f"attention through all blocks, {NOT_SPECIFIC}",
        is_specific=False,
    ),
    "raw_attention": Method(
        lambda m, x, *_: raw_attention(m, x),
        f"attention of the pooling, {NOT_SPECIFIC}",
        is_specific=False,
    ),
}


def compute_maps(
    model: MegaVit,
    images: Tensor,
    target: Target,
    methods: Sequence[str] = ("located",),
    *,
    baseline: Baseline = BLACK,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Maps of the images [B, C, H, W] in [-1, 1], float32 [B, h, w], by name of the method. The model is in
    evaluation mode; the ranks of a TP group have the same images and get the same maps. Works inside
    `Engine.call`. Raises ValueError for a method that there is not."""
    check_methods(methods)
    return {name: METHODS[name].compute(model, images, target, baseline, progress) for name in methods}


def check_methods(methods: Sequence[str]) -> None:
    """ValueError, naming those that there are, unless there is at least one and each is one of them."""
    if not methods:
        raise ValueError(f"no method is named; there are {', '.join(METHODS)}")
    for name in methods:
        if name not in METHODS:
            hint = nearest(name, METHODS)
            raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}{hint}")
