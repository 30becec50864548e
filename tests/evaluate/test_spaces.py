"""A model's classes and a set's are matched by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavit.evaluate.sets.image_set import ImageSet, Pixels, one_label
from megavit.evaluate.sets.imagenet_classes import class_of_wnid, imagenet_names, space_of
from megavit.evaluate.spaces import in_classes_of
from tests.evaluate.models import small_model
from tests.exports import NAMES, write_export


def named(names: tuple[str, ...], labels: list[int], candidates: list[int] | None = None) -> ImageSet:
    pixels = Pixels("own", np.zeros((len(labels), 4, 4), np.uint8))
    return ImageSet(
        "own",
        "test",
        pixels,
        one_label(labels),
        names,
        space_of(names),
        pixels.digest(),
        candidates=None if candidates is None else np.array(candidates),
    )


def test_labels_follow_the_names(tmp_path: Path) -> None:
    """Catches labels that are taken by number where classes are in another order, or only some of them."""
    model = small_model(tmp_path / "model")
    assert model.class_names == NAMES
    same = named(NAMES, [2, 0])
    assert in_classes_of(model, same) is same
    turned = in_classes_of(model, named((NAMES[2], NAMES[0]), [0, 1, -1], [0]))
    assert turned.labels[:, 0].tolist() == [2, 0, -1]
    assert turned.candidates is not None and turned.candidates.tolist() == [2]
    assert turned.class_names == NAMES


def test_numbers_stand_for_classes_that_nobody_has_named(tmp_path: Path) -> None:
    """Catches a model without names that cannot be scored, or is scored on another number of classes."""
    model = small_model(write_export(tmp_path / "model", names=()))
    assert in_classes_of(model, named(("x", "y", "z"), [1])).labels.tolist() == [[1]]
    with pytest.raises(ValueError, match="own has 2 classes and the model 3 outputs"):
        in_classes_of(model, named(("x", "y"), [1]))


def test_other_classes_are_an_error_with_the_cause(tmp_path: Path) -> None:
    """Catches accuracy near zero in the place of a message."""
    model = small_model(tmp_path / "model")
    with pytest.raises(ValueError, match="classes that model does not know, such as 'dog': .* linear, knn"):
        in_classes_of(model, named(("dog", "cat", "ñandú"), [1]))


def test_imagenet_is_known_by_ids_and_by_names(tmp_path: Path) -> None:
    """Catches a model trained on folders of WordNet ids that is refused, or scored in another order."""
    images = named(imagenet_names(), [7])
    for number, names in enumerate((tuple(class_of_wnid()), imagenet_names())):
        folder = write_export(tmp_path / f"model{number}", names=names, num_classes=1000)
        assert in_classes_of(small_model(folder), images) is images
    nobody = small_model(write_export(tmp_path / "nobody", names=(), num_classes=1000))
    assert in_classes_of(nobody, images).labels.tolist() == [[7]]
