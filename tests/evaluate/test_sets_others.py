"""ObjectNet, CIFAR, CelebA, cue-conflict images and folders of images, in their forms on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from megavit.evaluate.sets.celeba import celeba
from megavit.evaluate.sets.cifar import cifar10, cifar100
from megavit.evaluate.sets.cue_conflict import CATEGORIES, category_members, cue_conflict
from megavit.evaluate.sets.folder import image_folder
from megavit.evaluate.sets.image_set import Adjust, MissingData
from megavit.evaluate.sets.imagenet_classes import imagenet_classes, imagenet_names
from megavit.evaluate.sets.objectnet import objectnet
from tests.evaluate import fixtures
from tests.evaluate.fixtures import DUMBBELL, encoded, put


def test_objectnet_maps_through_its_own_files(tmp_path: Path) -> None:
    """Catches the lines of the devkit taken for class ids, a class without its second id, and images of
    classes that ImageNet has not."""
    fixtures.make_objectnet(tmp_path)
    found = objectnet(tmp_path)
    assert found.labels.tolist() == [[444, 671], [444, 671], [DUMBBELL, -1], [DUMBBELL, -1]]
    assert found.candidates is not None and found.candidates.tolist() == [444, DUMBBELL, 671]
    assert found.right == "any" and found.adjust == Adjust(border=2) and found.space == "imagenet"
    assert found.images.key(0) == "bicycle/000000000000000.png"


def test_objectnet_without_a_mapping_is_refused(tmp_path: Path) -> None:
    """Catches images numbered by their folders where a mapping file is missing, cut off or of other data."""
    base = fixtures.make_objectnet(tmp_path)
    for name in (
        "folder_to_objectnet_label.json",
        "objectnet_to_imagenet_1k.json",
        "pytorch_to_imagenet_2012_id.json",
        "imagenet_to_label_2012_v2",
    ):
        path = base / "mappings" / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(MissingData, match=f"{name} does not exist"):
            objectnet(tmp_path)
        path.write_bytes(content[:-30])
        with pytest.raises(ValueError, match=name):
            objectnet(tmp_path)
        path.write_bytes(content)
    put(base / "images" / "unheard_of" / "0.png", encoded(0, "PNG"))
    with pytest.raises(ValueError, match="images/unheard_of is not in"):
        objectnet(tmp_path)


def test_cifar_needs_no_checksum(tmp_path: Path) -> None:
    """Catches planes read as rows, coarse labels, and a reader that refuses all files but the published."""
    fixtures.make_cifar10(tmp_path)
    train, test = cifar10(tmp_path, "train"), cifar10(tmp_path)
    assert train.labels[:, 0].tolist() == [1, 6, 2, 7, 3, 8, 4, 9, 5, 0]
    assert test.labels[:, 0].tolist() == [3, 9, 0] and test.class_names[3] == "class3"
    stored = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes(), encoding="bytes")
    pixels = test.images.read(1)
    assert isinstance(pixels, np.ndarray) and pixels.shape == (32, 32, 3)
    assert pixels[5, 7].tolist() == [stored[b"data"][1, plane * 1024 + 5 * 32 + 7] for plane in range(3)]
    assert (test.space, train.digest != test.digest) == ("cifar10", True)
    fixtures.make_cifar100(tmp_path)
    assert cifar100(tmp_path).labels[:, 0].tolist() == [0, 98] and cifar100(tmp_path).space == "cifar100"


def test_cifar_says_what_is_missing_and_runs_no_code(tmp_path: Path) -> None:
    """Catches a pickle that runs a program, and a missing batch that makes the set smaller."""
    with pytest.raises(MissingData, match="cifar-10-batches-py does not exist"):
        cifar10(tmp_path)
    base = fixtures.make_cifar10(tmp_path)
    (base / "data_batch_4").unlink()
    with pytest.raises(MissingData, match="data_batch_4 does not exist"):
        cifar10(tmp_path, "train")
    assert len(cifar10(tmp_path)) == 3
    (base / "test_batch").write_bytes(pickle.dumps({b"data": Path}))
    with pytest.raises(ValueError, match="test_batch is not a CIFAR file.*may hold arrays only"):
        cifar10(tmp_path)


def test_celeba_has_a_target_and_groups(tmp_path: Path) -> None:
    """Catches -1 kept as a class, attributes of other images, and the validation images among the test."""
    fixtures.make_celeba(tmp_path, (3, 1, 3))
    found = celeba(tmp_path)
    assert [found.images.key(i) for i in range(3)] == ["000005.jpg", "000006.jpg", "000007.jpg"]
    assert found.labels[:, 0].tolist() == [0, 1, 0] and found.class_names == ("not Smiling", "Smiling")
    assert {name: values.tolist() for name, values in found.groups.items()} == {
        "Attractive": [1, 1, 1],
        "Male": [0, 1, 0],
        "Smiling": [0, 1, 0],
    }
    assert celeba(tmp_path, "train", "Attractive").labels[:, 0].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no attribute 'Happy'; it has Attractive"):
        celeba(tmp_path, target="Happy")


def test_celeba_of_one_image_and_what_is_missing(tmp_path: Path) -> None:
    """Catches a split of one image read as a number instead of a row, files that are cut off, and an image
    that is gone found out in the middle of a pass."""
    base = fixtures.make_celeba(tmp_path, (2, 1, 1))
    assert celeba(tmp_path).labels.tolist() == [[0]] and len(celeba(tmp_path).groups["Male"]) == 1
    attributes = base / "list_attr_celeba.txt"
    content = attributes.read_text()
    attributes.write_text(content.rsplit("\n", 2)[0])
    with pytest.raises(ValueError, match="has 3 images, its first line says 4"):
        celeba(tmp_path)
    attributes.write_text(content[:-6])
    with pytest.raises(ValueError, match="line 6: there are not 3 numbers"):
        celeba(tmp_path)
    attributes.write_text(content)
    (base / "img_align_celeba" / "000004.jpg").unlink()
    with pytest.raises(MissingData, match="img_align_celeba lacks 1 of the 1 images of test: 000004.jpg"):
        celeba(tmp_path)
    (base / "list_eval_partition.txt").unlink()
    with pytest.raises(MissingData, match="list_eval_partition.txt does not exist"):
        celeba(tmp_path)


def test_cue_conflict_names_tell_shape_and_texture(tmp_path: Path) -> None:
    """Catches shape and texture in each other's place, a name that does not tell, and categories whose
    members are not ImageNet's classes of that kind."""
    base = fixtures.make_cue_conflict(tmp_path)
    put(base / "session-1" / "0001_cue_dnn_dog_00_dog10-bird2.png", encoded(1, "PNG"))
    found = cue_conflict(tmp_path)
    named = [(CATEGORIES[s], CATEGORIES[t]) for s, t in zip(*found.groups.values(), strict=True)]
    assert named == [("bird", "dog"), ("bird", "bird"), ("dog", "bird"), ("dog", "bird")]
    assert found.labels[:, 0].tolist() == found.groups["shape"].tolist()
    members = dict(zip(CATEGORIES, category_members(), strict=True))
    assert {name: len(ids) for name, ids in members.items()} | {"dog": 0, "bird": 0} == {
        "airplane": 1,
        "bear": 4,
        "bicycle": 2,
        "bird": 0,
        "boat": 5,
        "bottle": 7,
        "car": 3,
        "cat": 6,
        "chair": 4,
        "clock": 3,
        "dog": 0,
        "elephant": 2,
        "keyboard": 2,
        "knife": 1,
        "oven": 1,
        "truck": 8,
    }
    assert members["airplane"].tolist() == [404] and imagenet_classes()[404].name == "airliner"
    put(base / "cat" / "dog1-bird1.png", encoded(2, "PNG"))
    with pytest.raises(ValueError, match="dog1-bird1.png has the shape of a dog"):
        cue_conflict(tmp_path)
    (base / "cat" / "dog1-bird1.png").unlink()
    put(base / "cat" / "cat1.png", encoded(2, "PNG"))
    with pytest.raises(ValueError, match="cat1.png is not named by its shape and texture"):
        cue_conflict(tmp_path)


def test_an_image_folder_has_the_classes_of_train(tmp_path: Path) -> None:
    """Catches extensions in capitals passed over, val read where test is, and classes that depend on the
    split."""
    fixtures.make_image_folder(tmp_path, ("train", "val", "test"))
    train, test = image_folder(tmp_path, "train"), image_folder(tmp_path)
    assert (len(train), len(test)) == (6, 2) and train.class_names == test.class_names == ("cat", "dog")
    assert train.space == test.space
    for found in (train, test):
        for i in range(len(found)):
            assert found.images.key(i).split("/")[1] == ("cat", "dog")[found.labels[i, 0]]
    assert {test.images.key(i).split("/")[0] for i in range(2)} == {"test"}


def test_an_image_folder_without_train(tmp_path: Path) -> None:
    """Catches the folder of a split taken for a class, and unsplit images that can be reached as neither."""
    fixtures.make_image_folder(tmp_path / "a", ("val",))
    assert image_folder(tmp_path / "a").class_names == ("cat", "dog")
    with pytest.raises(MissingData, match="a/train does not exist"):
        image_folder(tmp_path / "a", "train")
    fixtures.make_image_folder(tmp_path / "b", (".",))
    assert len(image_folder(tmp_path / "b")) == 2
    with pytest.raises(MissingData, match="b/train does not exist"):
        image_folder(tmp_path / "b", "train")
    with pytest.raises(MissingData, match="c does not exist"):
        image_folder(tmp_path / "c")


def test_a_folder_of_all_wordnet_ids_is_imagenet(tmp_path: Path) -> None:
    """Catches 1000 folders named by WordNet ids that a classifier of ImageNet could not be scored on."""
    for known in imagenet_classes():
        put(tmp_path / "train" / known.wnid / "a.jpg", b"")
    found = image_folder(tmp_path, "train")
    assert found.space == "imagenet" and found.class_names == imagenet_names()
