"""Label spaces: whether the classes of a model are those of a data set, which their names decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megavit.evaluate.model import FrozenModel
from megavit.evaluate.sets.checks import check_space
from megavit.evaluate.sets.image_set import ImageSet
from megavit.evaluate.sets.imagenet_classes import space_of

_MOST_SHOWN = 3


def in_classes_of(model: FrozenModel, images: ImageSet) -> ImageSet:
    """The set with the model's own class numbers as labels, so that its classifier can be scored on it.

    The classes are matched by name; those of a model whose classes have numbers for names, by number, if
    there are as many. ValueError, saying which classes do not match and the likely cause, if they do not.
    """
    if not model.num_classes:
        raise ValueError(f"{model.name} has no classifier; use linear, knn or fewshot, which need none")
    if space_of(model.class_names) == images.space:
        return images
    numbers = {name: number for number, name in enumerate(model.class_names)}
    unknown = [name for name in images.class_names if name not in numbers]
    if not unknown:
        order = np.array([numbers[name] for name in images.class_names])
        return _renamed(model, images, order)
    nameless = model.class_names == tuple(map(str, range(model.num_classes)))
    if nameless and model.num_classes == len(images.class_names):
        return _renamed(model, images, np.arange(model.num_classes))
    check_space(model.num_classes, images)
    raise ValueError(
        f"{images.name} has classes that {model.name} does not know, such as {_some(unknown)}: its "
        f"{model.num_classes} classes are {_some(model.class_names)}. Name the classes alike (classes.txt "
        f"beside the shards, names of folders), or measure features instead: linear, knn, fewshot"
    )


def _renamed(model: FrozenModel, images: ImageSet, order: np.ndarray) -> ImageSet:
    """With class i called order[i]."""
    labels = np.where(images.labels < 0, -1, order[images.labels])
    candidates = None if images.candidates is None else order[images.candidates]
    return dataclasses.replace(images, labels=labels, candidates=candidates, class_names=model.class_names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_MOST_SHOWN]) + more
