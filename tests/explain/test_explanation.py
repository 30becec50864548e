"""`megavit.explain`: the record of one decision."""

from __future__ import annotations

import dataclasses
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megavit
from megavit.explain.explainer import class_number, subject_of
from megavit.explain.explanation import Explanation, Judged
from megavit.explain.faithfulness import BEST_RANDOM, CENTRED, RANDOM
from megavit.explain.methods import METHODS, compute_maps
from megavit.explain.target import Target
from megavit.explain.tokens import high_norms
from megavit.predictor import Predictor
from tests.exports import NAMES, write_export


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return megavit.load(write_export(tmp_path_factory.mktemp("export"), crop=1.0))


@pytest.fixture(scope="module")
def all_of_it(predictor: Predictor) -> Explanation:
    return megavit.explain(predictor, photo(), methods=list(METHODS))


def test_an_explanation_is_of_the_decision_that_the_model_makes(
    predictor: Predictor, all_of_it: Explanation
) -> None:
    """Catches maps of another class or image, a baseline that is not black, and probabilities of the other
    kind of loss."""
    said = predictor(photo())
    assert torch.equal(all_of_it.logits, said.logits[0])
    assert torch.equal(all_of_it.probabilities, said.probabilities[0])
    best = int(said.logits[0].argmax())
    assert all_of_it.target == (
        best,
        NAMES[best],
        float(said.logits[0, best]),
        float(said.probabilities[0, best]),
    )
    images = predictor.as_input(torch.from_numpy(np.asarray(photo())[None].copy()))
    expected = compute_maps(predictor.model, images, Target(torch.tensor([best])), list(METHODS))
    assert list(all_of_it.maps) == list(METHODS)
    for name, values in all_of_it.maps.items():
        assert values.dtype == torch.float32 and values.shape == (4, 4)
        torch.testing.assert_close(values, expected[name][0])
    assert all_of_it.path.probabilities[-1].item() == pytest.approx(all_of_it.target.probability, rel=1e-4)
    norms = high_norms(predictor.model, images)
    assert torch.equal(all_of_it.high_norms, norms.by_block[:, 0])
    assert all_of_it.on_high_norms == {name: float(norms.share_of_top(expected[name])) for name in METHODS}
    for name, sums in all_of_it.sums.items():
        assert METHODS[name].adds_up and sums.total == pytest.approx(float(expected[name].sum()), rel=1e-4)
    assert set(all_of_it.sums) == {"frozen", "integrated_gradients"}


def test_one_class_rather_than_another(predictor: Predictor, all_of_it: Explanation) -> None:
    """Catches a class that is held against itself, and names that are taken for others."""
    best = all_of_it.target.number
    found = megavit.explain(predictor, photo(), against=best, faithfulness=False)
    second = int(all_of_it.logits.argsort(descending=True)[1])
    assert (found.target.number, found.against and found.against.number) == (second, best)
    assert found.question == f"why {NAMES[second]} rather than {NAMES[best]}" and not found.faithfulness
    named = megavit.explain(predictor, photo(), NAMES[second], NAMES[best].upper(), faithfulness=False)
    assert torch.equal(named.maps["located"], found.maps["located"]) and not named.verdict("located")
    with pytest.raises(ValueError, match="target and against are the same class"):
        megavit.explain(predictor, photo(), 1, "cat")
    with pytest.raises(ValueError, match="no class is called 'kat', nor .*: there are 3; did you mean 'cat'"):
        megavit.explain(predictor, photo(), "kat")
    with pytest.raises(ValueError, match="no method is called 'locate'; there are .*did you mean 'located'"):
        megavit.explain(predictor, photo(), methods=["locate"])


def test_names_go_before_numbers() -> None:
    """Catches the class number 1 where the class called 1 is meant."""
    assert class_number(["1", "0", "two"], "1") == 0 and class_number(["1", "0", "two"], "2") == 2
    assert class_number(["a", "Cat"], "cAT") == 1 and class_number(["a", "b"], 1) == 1
    for word in ("3", "-1", ""):
        with pytest.raises(ValueError, match="the first ones are a, b"):
            class_number(["a", "b"], word)


def judged(**between: float) -> dict[str, Judged]:
    """Of a map, of random maps, of the best of them, of a blob: their insertion, at no deletion."""
    names = {"mine": "located", "random": RANDOM, "best": BEST_RANDOM, "blob": CENTRED}
    return {names[short]: Judged(value, 0.0, 0.0) for short, value in between.items()}


@pytest.mark.parametrize(
    ("between", "verdict"),
    [
        ({"mine": 0.1, "random": 0.1, "best": 0.2, "blob": 0.0}, "no better than a random map"),
        ({"mine": 0.2, "random": 0.1, "best": 0.2, "blob": 0.0}, "weak evidence"),
        ({"mine": 0.3, "random": 0.1, "best": 0.2, "blob": 0.4}, "no better than a blob"),
        ({"mine": 0.5, "random": 0.1, "best": 0.2, "blob": 0.4}, "better than random maps and than a blob"),
    ],
)
def test_a_bad_map_is_called_so(all_of_it: Explanation, between: dict[str, float], verdict: str) -> None:
    """Catches a map that is shown as evidence although chance does as well."""
    maps = {"located": all_of_it.maps["located"]}
    found = dataclasses.replace(all_of_it, maps=maps, faithfulness=judged(**between))
    assert verdict in found.verdict("located") and not found.verdict(RANDOM)
    assert any("no better than a random" in warning for warning in found.warnings) == (between["mine"] == 0.1)


def test_a_share_on_registers_is_warned_of(all_of_it: Explanation) -> None:
    """Catches a warning at any share, or at none."""
    for share, is_warned in ((0.2, False), (0.21, True)):
        shares = dict.fromkeys(all_of_it.maps, 0.0) | {"frozen": share}
        found = dataclasses.replace(all_of_it, on_high_norms=shares).warnings
        assert any("of the top of the map frozen lies on" in warning for warning in found) == is_warned
    assert sum("is the same for every class" in warning for warning in all_of_it.warnings) == 2


def test_the_record_can_be_repeated(predictor: Predictor, tmp_path: Path) -> None:
    """Catches a record without what it takes: digests, settings, versions; and one that is no JSON."""
    path = tmp_path / "a.png"
    photo().save(path)
    found = [megavit.explain(predictor, path, seed=3) for _ in range(2)]
    record = json.loads(json.dumps(found[0].as_json()))
    assert record["provenance"]["input_sha256"] == sha256(path.read_bytes()).hexdigest()
    assert record["name"] == str(path) and record["provenance"]["seed"] == 3
    assert len(record["provenance"]["checkpoint_digest"]) == 32
    assert record["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["provenance"]["transform"]["link"] == "softmax"
    faithfulness = record["methods"]["located"]["faithfulness"]
    assert faithfulness["insertion_less_deletion"] == faithfulness["insertion"] - faithfulness["deletion"]
    assert set(record["controls"]) == {RANDOM, BEST_RANDOM, CENTRED}
    again = found[1].as_json()
    for one in (record, again):
        del one["provenance"]["date"]
    assert record == json.loads(json.dumps(again))
    other = megavit.explain(str(predictor.folder), path, seed=4)
    assert other.faithfulness["located"] == found[0].faithfulness["located"]
    assert other.faithfulness[RANDOM] != found[0].faithfulness[RANDOM]


def test_the_package_is_the_function() -> None:
    """Catches `megavit.explain` that is a function before a submodule is imported, and a module after it."""
    import megavit.explain.target

    assert callable(megavit.explain) and megavit.explain.target.Target is Target


def test_what_is_no_photo_is_said(predictor: Predictor, tmp_path: Path) -> None:
    """Catches errors that do not name the file."""
    (tmp_path / "a.jpg").write_bytes(b"Dear all,")
    with pytest.raises(ValueError, match="a.jpg: not an image"):
        megavit.explain(predictor, tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        subject_of(predictor, tmp_path / "none.jpg")
