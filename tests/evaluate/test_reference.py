"""Published numbers: beside which results they stand, and how sure they are said to be."""

from __future__ import annotations

import pytest

from megavit.evaluate.reference import Mark, references_for
from megavit.evaluate.results import Result
from megavit.evaluate.results_file import Recorded
from megavit.evaluate.table import table
from tests.evaluate.made import made, measured


def known(result: Result) -> dict[tuple[str, str], tuple[float, Mark, bool]]:
    return {(r.model, r.protocol): (r.value, r.mark, r.same_protocol) for r in references_for(result)}


@pytest.mark.parametrize(
    ("data", "value", "mark"),
    [
        ("imagenet", 0.895, Mark.SECOND_HAND),
        ("imagenet-real", 0.909, Mark.SECOND_HAND),
        ("imagenet-v2", 0.832, Mark.SECOND_HAND),
        ("imagenet-a", 0.838, Mark.SECOND_HAND),
        ("imagenet-r", 0.874, Mark.SECOND_HAND),
        ("objectnet", 0.743, Mark.UNVERIFIED),
    ],
)
def test_the_linear_probe_of_vit_22b(data: str, value: float, mark: Mark) -> None:
    """Catches a number on another set, or one that is said to be surer than it is."""
    assert known(made(measured(), data=data))["ViT-22B", "linear probe"] == (value, mark, True)


def test_the_smaller_models_are_unverified() -> None:
    """Catches recalled numbers that pass for printed ones."""
    found = known(made(measured(), data="imagenet"))
    for model, value in (
        ("e/14", 0.893),
        ("G/14", 0.89),
        ("g/14", 0.885),
        ("L/16", 0.867),
        ("B/16", 0.842),
        ("B/32", 0.802),
    ):
        assert found[f"ViT-{model}", "linear probe"] == (value, Mark.UNVERIFIED, True)
    assert found["InternViT-6B", "linear probe"] == (0.882, Mark.CONFIRMED, True)
    assert not any(protocol.startswith("LiT") for _, protocol in found), "a probe has no zero-shot beside it"


def test_zero_shot_beside_the_models_own_classifier_is_another_protocol() -> None:
    """Catches LiT's numbers that are read as a classifier's."""
    found = known(made(measured(), "imagenet-a", data="imagenet-a", protocol="own classifier"))
    assert found["ViT-22B", "LiT zero-shot"] == (0.901, Mark.CONFIRMED, False)
    assert found["PE-G", "zero-shot"] == (0.926, Mark.CONFIRMED, False)
    assert found["ViT-e", "LiT zero-shot"] == (0.88, Mark.UNVERIFIED, False)
    assert found["EVA-02-L/14 at 448", "fine-tuned"] == (0.8863, Mark.CONFIRMED, True)


def test_model_vs_human() -> None:
    """Catches shape bias and its companions without the models that people compare with."""
    found = known(made(measured("shape_bias"), "shape-bias", data="cue-conflict"))
    assert found["ViT-22B at 384", "model-vs-human"][:2] == (0.87, Mark.CONFIRMED)
    assert found["humans", "model-vs-human"][0] == 0.96
    found = known(made(measured("error_consistency"), "shape-bias", data="cue-conflict"))
    assert found["ViT-22B at 384", "model-vs-human"][0] == 0.258
    found = known(made(measured("ood_accuracy"), "model-vs-human"))
    assert found["ViT-22B at 224", "model-vs-human"][0] == 0.837


@pytest.mark.parametrize(
    ("task", "data", "metric"),
    [
        ("linear", "digits", "top1"),
        ("linear", "imagenet", "ece"),
        ("fewshot", "imagenet", "top1"),
        ("linear", "imagenet-c", "top1"),
    ],
)
def test_nothing_is_known_of_other_things(task: str, data: str, metric: str) -> None:
    """Catches a number of ImageNet beside digits, or of a probe beside few-shot accuracy."""
    assert references_for(made(measured(metric), task, data=data)) == []


def test_alexnet_is_the_norm_of_mce() -> None:
    """Catches an mCE that stands without its scale."""
    found = known(made(measured("mce"), "imagenet-c", data="imagenet-c"))
    assert found["AlexNet", "fine-tuned"][0] == 1.0


def test_a_column_is_shown_where_it_has_a_number_and_its_mark_is_explained() -> None:
    """Catches empty columns of every published model, and marks without a legend."""
    rows = (
        made(measured(), data="imagenet"),
        made(measured(), "knn"),
        made(measured(), "imagenet", data="imagenet"),
    )
    text = table([Recorded(rows)]).markdown()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert ["*" in block[0] for block in blocks] == [True, False, True]
    linear, _, own = blocks
    assert "*ViT-22B*" in linear[0] and "*DINOv3 ViT-L, fast recipe*" in linear[0] and "LiT" not in linear[0]
    assert " 89.5 ~ |" in linear[2] and " 89.0 ? |" in linear[2] and " 88.2 |" in linear[2]
    assert "*ViT-22B, LiT zero-shot*" in own[0] and " 85.9 ‡ |" in own[2] and " 85.4 ? ‡ |" in own[2]
    for legend in (
        "~ second-hand",
        "? unverified",
        "‡ by another protocol",
        "From InternVL's paper, table 4: ViT-22B",
    ):
        assert f"\n- {legend}" in text
    plain = table([Recorded(rows[1:2])]).markdown()
    assert not any(word in plain for word in ("unverified", "second-hand", "ViT-22B"))
