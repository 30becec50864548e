"""What is measured of models of depth and segmentation on a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megavit.evaluate.protocols.depth import depth_errors
from megavit.evaluate.protocols.segment import segmentation_scores
from megavit.evaluate.results import Measurement
from megavit.evaluate.session import Session
from megavit.evaluate.sets.dense import DenseSet
from megavit.tasks.metrics import Crop

_MIN_M, _MAX_M = 1e-3, 10.0
_CROPS: dict[str, Crop] = {"nyu": "eigen", "kitti": "garg"}
_MOST_SHOWN = 3


def measure_depth(session: Session, data: str) -> Iterator[tuple[Measurement, DenseSet]]:
    """The errors of depth on a set, up to the depth that the set is measured to."""
    images, config = session.open_dense(data, "depth"), session.config
    crop = _CROPS.get(data, "none") if config.crop == "usual" else config.crop
    limits = (_MIN_M, images.facts.max_m or _MAX_M)
    with session.maps(images) as maps:
        found = list(
            depth_errors(maps, limits=limits, crop=crop, align=config.align, settings=_settings(images))
        )
    for measurement in found:
        yield measurement, images


def measure_segment(session: Session, data: str) -> Iterator[tuple[Measurement, DenseSet]]:
    """The mean IoU and accuracies of classes on a set. ValueError for a model of other classes."""
    images = session.open_dense(data, "mask")
    assert session.dense
    class_of = classes_in(images, session.model.name, session.dense.names)
    with session.maps(images) as maps:
        found = list(
            segmentation_scores(
                maps,
                class_of=class_of,
                class_names=images.class_names,
                settings=_settings(images),
                seed=session.config.seed,
            )
        )
    for measurement in found:
        yield measurement, images


def _settings(images: DenseSet) -> dict[str, Any]:
    return {"images": images.images} if images.images else {}


def classes_in(images: DenseSet, model: str, names: tuple[str, ...]) -> Tensor:
    """int64 [K], the set's number of each of the model's classes, called `names`: matched by name, or by
    number if one of the two has numbers for names. ValueError if they do not match."""
    theirs, numbers = images.class_names, tuple(map(str, range(len(names))))
    if names == theirs or (len(names) == len(theirs) and numbers in (names, theirs)):
        return torch.arange(len(names))
    if sorted(names) == sorted(theirs):
        return torch.tensor([theirs.index(name) for name in names])
    raise ValueError(
        f"{images.name} has {len(images.class_names)} classes ({_some(images.class_names)}), and {model} the "
        f"{len(names)} of another set ({_some(names)})"
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")
