"""Shape bias and error consistency, on decisions that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from megavit.evaluate.protocols.shape_bias import decide, error_consistency, shape_bias
from megavit.evaluate.results import Count, Measurement
from megavit.evaluate.sets.image_set import Files
from tests.evaluate.protocols.toys import features_of, softmax

CATEGORIES = {"class0": [0, 1, 2, 3, 4, 5], "class1": [6], "class2": [8, 9]}  # 7 is in none
PICTURES = ("dog1-cat2", "dog3-cat1", "cat1-cat2", "dog2-bird1", "bird1-cat3", "bird2-dog1")


def measure(
    decisions: list[int],
    shape: list[int],
    texture: list[int],
    people: Path | None = None,
    bad: tuple[int, ...] = (),
) -> dict[str, Measurement]:
    """Of a model that decides so, on images that are called as `PICTURES`."""
    z = np.zeros((len(decisions), 10))
    for row, place in enumerate(decisions):
        z[row, list(CATEGORIES.values())[place]] = 9
    columns = {"shape": np.array(shape), "texture": np.array(texture)}
    features = features_of(z, np.array(shape), classes=3, groups=columns, bad=bad)
    files = Files("", tuple(f"dog/{name}.png" for name in PICTURES[: len(z)]))
    object.__setattr__(features.set, "images", files)
    return {m.metric: m for m in shape_bias(features, lambda values: values, CATEGORIES, people)}


def test_categories_win_by_their_mean() -> None:
    """Catches the sum, by which six unlikely classes beat a likely one, the maximum, and logits averaged
    instead of probabilities."""
    z = np.random.default_rng(0).normal(size=(200, 10)).astype(np.float32).astype(float) * 1.0
    found = decide(features_of(z, np.zeros(200)), lambda values: values, list(CATEGORIES.values()))
    p = softmax(z)
    groups = list(CATEGORIES.values())
    mean, total, high = (
        np.stack([how(p[:, ids], 1) for ids in groups], 1).argmax(1) for how in (np.mean, np.sum, np.max)
    )
    np.testing.assert_array_equal(found, mean)
    assert (mean != total).any() and (mean != high).any()
    assert (mean != np.stack([z[:, ids].mean(1) for ids in groups], 1).argmax(1)).any()


def test_bias_is_among_decisions_for_either_cue() -> None:
    """Catches decisions for a third category in the denominator, images whose two cues agree, and bad
    ones."""
    shape, texture = [0, 0, 1, 0, 2, 2], [1, 1, 1, 2, 1, 0]
    found = measure([0, 1, 1, 1, 2, 2], shape, texture, bad=(5,))
    # Image by image: shape, texture, (no conflict), neither, shape, (bad).
    assert found["shape_bias"].value == pytest.approx(2 / 3)
    assert found["shape_bias"].count == Count(6, 3, 1)
    assert found["shape_bias"].settings["by_category"] == {"class0": 0.5, "class1": None, "class2": 1.0}
    assert found["shape_accuracy"].value == 0.5 and found["texture_share"].value == 0.25
    assert found["shape_accuracy"].count == Count(6, 4, 1)
    assert found["shape_bias"].stderr == pytest.approx(np.sqrt(2 / 9 / 3))


def test_kappa() -> None:
    """Catches agreement that is not corrected for chance: against the definition, scikit-learn, and observers
    who err together, apart, and independently."""
    random = np.random.default_rng(0)
    a = random.random(500) < 0.7
    b = np.where(random.random(500) < 0.5, a, random.random(500) < 0.6)
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    assert error_consistency(a, b) == pytest.approx(((a == b).mean() - chance) / (1 - chance), abs=1e-6)
    assert error_consistency(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-6)
    assert error_consistency(a, a) == pytest.approx(1)
    half = np.arange(500) % 2 == 0
    assert error_consistency(half, ~half) == pytest.approx(-1)
    assert abs(error_consistency(random.random(40_000) < 0.7, random.random(40_000) < 0.7)) < 0.02
    assert np.isnan(error_consistency(np.ones(5, bool), np.ones(5, bool)))


def write(path: Path, rows: list[str]) -> Path:
    path.write_text(
        "subj,Session,trial,rt,object_response,category,condition,imagename\n" + "\n".join(rows) + "\n"
    )
    return path


def test_consistency_with_people(tmp_path: Path) -> None:
    """Catches images matched by their place, a person's missing images taken for errors, people pooled into
    one, and 'na' (no answer in time) read as right."""
    answers = {
        "subject-01": ["class0", "class1", "na", "class0"],
        "subject-02": ["class0", "class0", "class1", "class2", "class1", "class2"],
    }
    shape, texture, decisions = [0, 0, 1, 0, 2, 2], [1, 1, 1, 2, 1, 0], [0, 1, 1, 1, 2, 1]
    rows = [
        f"{person},1,{number},0.6,{answer},class{shape[number]},0,{number:04}_cc_dnn_0_x_00_{PICTURES[number]}.png"
        for person, given in answers.items()
        for number, answer in reversed(list(enumerate(given)))
    ]
    found = measure(decisions, shape, texture, write(tmp_path / "people.csv", rows))["error_consistency"]
    model = np.array(decisions) == shape
    kappas = [
        cohen_kappa_score(model[: len(given)], [a == f"class{s}" for a, s in zip(given, shape, strict=False)])
        for given in answers.values()
    ]
    assert found.value == pytest.approx(np.mean(kappas), abs=1e-6)
    assert list(found.settings["people"].values()) == pytest.approx(kappas, abs=1e-6)
    assert found.count == Count(6, 6, 0)
    assert found.stderr == pytest.approx(np.std(kappas, ddof=1) / np.sqrt(2), abs=1e-6)
    folder = measure(decisions, shape, texture, tmp_path)["error_consistency"]
    assert folder.value == found.value


def test_decisions_of_another_set(tmp_path: Path) -> None:
    """Catches a consistency over no image, with shapes that the set does not have, or from another kind of
    file."""
    shape, texture = [0, 0, 1], [1, 1, 0]
    strange = write(tmp_path / "a.csv", ["s,1,1,0,class0,class0,0,lion7-cat2.png"])
    with pytest.raises(
        ValueError, match=r"no image name of .*a\.csv is one of the data set's, such as dog1-cat2"
    ):
        measure([0, 0, 1], shape, texture, strange)
    wrong = write(tmp_path / "b.csv", ["s,1,1,0,class0,class2,0,dog1-cat2.png"])
    with pytest.raises(ValueError, match="a class2, the data set a class0"):
        measure([0, 0, 1], shape, texture, wrong)
    (tmp_path / "c.csv").write_text("image,answer\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns subj, object_response, category, imagename"):
        measure([0, 0, 1], shape, texture, tmp_path / "c.csv")


def test_a_head_of_other_classes_is_refused() -> None:
    """Catches categories that index a head of ten classes."""
    features = features_of(np.zeros((2, 10)), np.zeros(2), classes=2, groups={"texture": np.ones(2, int)})
    with pytest.raises(ValueError, match="class ids up to 281, but the classifier has only 10 outputs"):
        list(shape_bias(features, lambda values: values, {"class0": [0], "class1": [281]}))
    with pytest.raises(ValueError, match="categories are cat, but toy has class0, class1"):
        list(shape_bias(features, lambda values: values, {"cat": [0]}))
