"""mCE and its relatives: on AlexNet's own errors, and against sums written out."""

from __future__ import annotations

import numpy as np
import pytest

from megavit.evaluate.protocols.corruption import (
    ALEXNET,
    ALEXNET_CLEAN,
    ALEXNET_EXTRA,
    Outcome,
    corrupted,
    imagenet_c,
    outcome,
)
from megavit.evaluate.protocols.scores import score
from megavit.evaluate.results import Count, Measurement
from tests.evaluate.protocols.toys import features_of

# The normalisers of the 15 CEs as hendrycks/robustness and timm have them: means over severities.
MEANS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def with_error(error: float, n: int = 50_000) -> Outcome:
    """n images of which this share is mistaken."""
    wrong = np.zeros(n)
    wrong[: round(error * n)] = 1
    return Outcome(wrong, Count(n, n, 0))


def parts_of(tables: dict[str, tuple[float, ...]], n: int = 50_000) -> dict[tuple[str, int], Outcome]:
    return {(c, s): with_error(e, n) for c, errors in tables.items() for s, e in enumerate(errors, 1)}


def by_name(found: object) -> dict[str, Measurement]:
    return {m.metric: m for m in found}  # type: ignore[attr-defined]


def test_the_table_has_the_published_means() -> None:
    """Catches a mistyped error: the means over severities are printed in several places."""
    assert list(ALEXNET) == list(MEANS)
    for name, errors in ALEXNET.items():
        assert len(errors) == 5 and np.mean(errors) == pytest.approx(MEANS[name], abs=1e-6), name
    every = [e for table in (ALEXNET, ALEXNET_EXTRA) for errors in table.values() for e in errors]
    assert all(abs(e * 50_000 - round(e * 50_000)) < 1e-6 for e in every)  # each is a number of 50,000 images


def test_alexnet_has_100_percent() -> None:
    """Catches any slip in the definition: AlexNet's own errors give 1 in mCE, relative mCE and the extra
    mCE."""
    found = by_name(imagenet_c(parts_of(ALEXNET | ALEXNET_EXTRA), with_error(ALEXNET_CLEAN)))
    for metric in ("mce", "relative_mce", "mce_extra"):
        assert found[metric].value == pytest.approx(1, abs=1e-6), metric
        assert not found[metric].higher_is_better
    assert found["mce"].count == Count(75 * 50_000, 75 * 50_000, 0)
    assert found["mce"].settings["ce"] == pytest.approx(dict.fromkeys(ALEXNET, 1.0), abs=1e-6)
    assert found["mce"].settings["accuracy"]["fog"] == pytest.approx([1 - e for e in ALEXNET["fog"]])


def test_numbers_are_those_of_the_definitions() -> None:
    """Catches ratios that are averaged over severities, the extra corruptions in the mean, a relative mCE
    whose AlexNet is not relative."""
    random = np.random.default_rng(0)
    n = 200
    tables = {c: tuple(np.round(random.uniform(0.1, 0.6, 5) * n) / n) for c in ALEXNET | ALEXNET_EXTRA}
    clean = 0.21
    found = by_name(imagenet_c(parts_of(tables, n), with_error(clean, n)))
    ce = [sum(tables[c]) / sum(ALEXNET[c]) for c in ALEXNET]
    relative = [
        sum(e - clean for e in tables[c]) / sum(a - ALEXNET_CLEAN for a in ALEXNET[c]) for c in ALEXNET
    ]
    per_severity = np.mean([np.mean(np.divide(tables[c], ALEXNET[c])) for c in ALEXNET])
    assert found["mce"].value == pytest.approx(np.mean(ce), abs=1e-6)
    assert abs(found["mce"].value - per_severity) > 1e-3
    assert found["relative_mce"].value == pytest.approx(np.mean(relative), abs=1e-6)
    assert found["corrupted_accuracy"].value == pytest.approx(
        1 - np.mean([tables[c] for c in ALEXNET]), abs=1e-6
    )
    extra = [sum(tables[c]) / sum(ALEXNET_EXTRA[c]) for c in ALEXNET_EXTRA]
    assert found["mce_extra"].value == pytest.approx(np.mean(extra), abs=1e-6)


def test_a_part_that_is_missing() -> None:
    """Catches a mean over what is there that is called mCE."""
    parts = parts_of(ALEXNET, 10)
    del parts["fog", 3], parts["snow", 5]
    with pytest.raises(ValueError, match="lacks 2 of its 75 parts: snow/5, fog/3"):
        list(imagenet_c(parts))
    assert set(by_name(imagenet_c(parts_of(ALEXNET, 10)))) == {"mce", "corrupted_accuracy"}


def test_the_standard_error_knows_that_images_are_the_same() -> None:
    """Catches 75 parts taken for 75 independent sets: an image that is mistaken in one is mistaken in all
    here, so that the standard error is that of a single set, 75 ** .5 times larger. Against drawing images
    anew."""
    random = np.random.default_rng(1)
    wrong = (random.random(400) < 0.3).astype(float)
    same = {(c, s): Outcome(wrong, Count(400, 400, 0)) for c in ALEXNET for s in range(1, 6)}
    found = by_name(imagenet_c(same))
    per_error = np.mean([5 / sum(errors) for errors in ALEXNET.values()])
    assert found["mce"].stderr == pytest.approx(per_error * wrong.std() / 20, abs=1e-9)
    assert found["corrupted_accuracy"].stderr == pytest.approx(wrong.std() / 20, abs=1e-9)
    chance = {key: Outcome(random.permutation(wrong), part.count) for key, part in same.items()}
    assert by_name(imagenet_c(chance))["mce"].stderr < found["mce"].stderr / 5


def test_ones_own_set() -> None:
    """Catches the drop in points for the share that is lost, an mCE without AlexNet, images that do not
    count, and a standard error of the drop that leaves out the clean accuracy's: against drawing the images
    anew."""
    random = np.random.default_rng(2)
    ability = random.random(300)
    matrix = np.stack([(ability < q).astype(float) for q in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)])
    counts = Count(310, 300, 6)
    columns = [Outcome(np.append(row, [np.nan] * 10), counts) for row in matrix]
    parts = {(c, s): columns[1 + s + 3 * i - 1] for i, c in enumerate("ab") for s in (1, 2, 3)}
    found = by_name(corrupted(parts, columns[0]))
    clean, kept = 1 - matrix[0].mean(), 1 - matrix[1:].mean()
    assert set(found) == {"corrupted_accuracy", "corruption_drop"}
    assert found["corrupted_accuracy"].value == pytest.approx(kept, abs=1e-6)
    assert found["corruption_drop"].value == pytest.approx(1 - kept / clean, abs=1e-6)
    assert found["corruption_drop"].count == Count(7 * 310, 7 * 300, 7 * 6)
    assert found["corrupted_accuracy"].settings["accuracy"]["b"] == pytest.approx(1 - matrix[4:].mean(1))
    drawn = [matrix[:, random.integers(0, 300, 300)] for _ in range(2000)]
    spread = np.std([1 - (1 - m[1:].mean()) / (1 - m[0].mean()) for m in drawn])
    assert found["corruption_drop"].stderr == pytest.approx(spread, rel=0.1)


def test_outcome_of_scores() -> None:
    """Catches a bad image that counts as an error."""
    features = features_of(np.eye(4), np.array([0, 1, 3, 3]), bad=[3])
    found = outcome(score(features, lambda values: values, "softmax"))
    np.testing.assert_array_equal(found.wrong, [0, 0, 1, np.nan])
    assert found.error == pytest.approx(1 / 3) and found.count == Count(4, 3, 1)
