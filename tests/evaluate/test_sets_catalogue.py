"""What is where: the list of all sets, and labels that do not fit a model."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from megavit.evaluate.sets.catalogue import CATALOGUE, describe, find
from megavit.evaluate.sets.checks import check_not_chance, check_space
from megavit.evaluate.sets.folder import image_folder
from megavit.evaluate.sets.image_set import MissingData
from megavit.evaluate.sets.imagenet import imagenet
from megavit.evaluate.sets.imagenet_classes import imagenet_classes
from tests.data.dense_fixtures import make_ade20k, make_kitti, make_nyu_labeled, make_voc
from tests.evaluate import fixtures
from tests.evaluate.fixtures import encoded, put


def test_every_entry_reads_what_it_says(tmp_path: Path) -> None:
    """Catches an entry that calls another set's reader, and a set that is there and not found."""
    fixtures.make_everything(tmp_path)
    for make in (make_kitti, make_ade20k, make_voc):
        make(tmp_path / "kitti" if make is make_kitti else tmp_path)
    make_nyu_labeled(tmp_path / "nyu")
    found = find(tmp_path)
    for one in found[-5:-1]:
        assert one.state == "found" and one.images == {"test": 3}, one
        images = pickle.loads(pickle.dumps(one.entry.open(tmp_path)))  # as decoding processes get it
        image, plane = images.sample(0)[1::2]
        assert image and plane
    for one in found[:-5]:
        assert one.state == "found" and list(one.images) == list(one.entry.splits), one
        for split in one.entry.splits:
            images = one.entry.open(tmp_path, split)
            assert images.name == one.entry.name and images.split == split
            assert len(images) == one.images[split] and images.images.read(0) is not None
    assert (found[-1].state, found[-1].images) == ("partly", {"parts": 5, "extra parts": 5})
    assert "70 of the 75 parts are missing: shot_noise/1" in found[-1].problem
    text = describe(found)
    assert "imagenet         found     train 4 of 1,281,167, test 4 of 50,000" in text
    assert CATALOGUE["imagenet-c/spatter/5"].open(tmp_path).name == "imagenet-c/spatter/5"
    with pytest.raises(ValueError, match="imagenet-a has no split 'train'"):
        CATALOGUE["imagenet-a"].open(tmp_path, "train")


def test_an_empty_root_says_where_everything_is_to_be_had(tmp_path: Path) -> None:
    """Catches a set that is called missing without the path, the layout or the place to obtain it from, and
    an error for a root that does not exist."""
    for root in (tmp_path, tmp_path / "nowhere"):
        found = find(root)
        assert {one.state for one in found} == {"missing"} and len(found) == 16
        for one in found:
            assert str(root) in one.problem and one.entry.origin.source in one.problem
            assert one.entry.origin.layout.splitlines()[0] in one.problem
    with pytest.raises(MissingData):
        CATALOGUE["celeba"].open(tmp_path)


def test_a_damaged_set_does_not_end_the_list(tmp_path: Path) -> None:
    """Catches one broken set that hides all others, and a split that is missing beside one that is there."""
    fixtures.make_imagenet(tmp_path)
    fixtures.make_cifar10(tmp_path)
    put(tmp_path / "imagenet-a" / "dogs" / "a.jpg", encoded(0))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").unlink()
    found = {one.entry.name: one for one in find(tmp_path)}
    assert found["imagenet"].state == "found"
    assert found["imagenet-a"].state == "unusable" and "imagenet-a/dogs" in found["imagenet-a"].problem
    assert found["cifar10"].state == "partly" and found["cifar10"].images == {"test": 3}
    assert "data_batch_1" in found["cifar10"].problem


def test_outputs_that_are_not_the_sets_classes_are_refused(tmp_path: Path) -> None:
    """Catches 200 folders scored against 1000 outputs by their places, and 1001 outputs one off."""
    fixtures.make_imagenet(tmp_path)
    check_space(1000, imagenet(tmp_path))
    with pytest.raises(ValueError, match="1001 outputs: one more, so a background class"):
        check_space(1001, imagenet(tmp_path))
    with pytest.raises(ValueError, match="imagenet has 1000 classes and the model 10 outputs: it was not"):
        check_space(10, imagenet(tmp_path))
    for known in imagenet_classes()[::5]:
        put(tmp_path / "mine" / known.wnid / "a.jpg", b"")
    mine = image_folder(tmp_path / "mine")
    with pytest.raises(ValueError, match="200 of ImageNet's WordNet ids.*imagenet-a"):
        check_space(1000, mine)
    check_space(200, mine)
    named = dataclasses.replace(mine, class_names=("a",) * 200)
    with pytest.raises(ValueError, match="trained on other classes"):
        check_space(1000, named)


def test_accuracy_at_chance_is_refused_only_where_it_proves_something() -> None:
    """Catches a number at chance reported as a result, and a weak model, a small sample, few classes or
    ImageNet-A refused."""
    for accuracy, classes, n in ((0.0012, 1000, 50_000), (0.0, 200, 30_000), (0.003, 113, 18_574)):
        with pytest.raises(ValueError, match=r"set: \d+ of .*The likely cause is"):
            check_not_chance(accuracy, classes, n, "set")
    check_not_chance(0.002, 1000, 50_000, "imagenet")  # twice chance is no chance
    check_not_chance(0.8, 1000, 50_000, "imagenet")
    check_not_chance(0.0, 1000, 2_000, "imagenet")
    check_not_chance(0.1, 10, 10_000, "cifar10")
    check_not_chance(0.0, 200, 7_500, "imagenet-a")
