"""ImageNet and its variants, in the layouts in which they are downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megavit.evaluate.sets.image_set import Adjust, MissingData
from megavit.evaluate.sets.imagenet import imagenet, imagenet_real
from megavit.evaluate.sets.imagenet_classes import (
    classes_also_in,
    imagenet_classes,
    imagenet_names,
    space_of,
)
from megavit.evaluate.sets.imagenet_variants import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    imagenet_a,
    imagenet_c,
    imagenet_c_parts,
    imagenet_r,
    imagenet_sketch,
    imagenet_v2,
)
from tests.evaluate import fixtures
from tests.evaluate.fixtures import DUMBBELL, GOLDFISH, KIT_FOX, TENCH, VAL_LABELS, WNIDS, encoded, put


def test_the_table_of_classes_is_ilsvrc_2012s() -> None:
    """Catches a table out of order, a class lost or doubled, and lists of -A and -R of another length."""
    classes = imagenet_classes()
    wnids = [known.wnid for known in classes]
    assert len(wnids) == 1000 and wnids == sorted(set(wnids))
    assert classes[0].name == "tench" and classes[999].name == "toilet tissue"
    assert len(set(imagenet_names())) == 1000
    assert len(classes_also_in("a")) == len(classes_also_in("r")) == 200
    # The first and last of timm 1.0.31's imagenet_{a,r}_indices.txt.
    assert classes_also_in("a")[[0, 1, 2]].tolist() == [6, 11, 13]
    assert classes_also_in("r")[[0, 1, 2]].tolist() == [1, 2, 4]
    assert space_of(imagenet_names()) == space_of(wnids) == "imagenet" != space_of(wnids[:200])


@pytest.mark.parametrize("layout", ["flat", "folders", "kaggle"])
def test_validation_images_have_their_labels_in_every_layout(tmp_path: Path, layout: str) -> None:
    """Catches devkit numbers taken for class ids, a list read in the order of its rows, and an order of
    images that depends on the layout, so that ReaL's labels or a cache would belong to other images."""
    fixtures.make_imagenet(tmp_path, layout)
    found = imagenet(tmp_path, "test")
    assert found.labels[:, 0].tolist() == VAL_LABELS
    assert [found.images.read(i) for i in range(4)] == [encoded(number) for number in range(1, 5)]
    assert found.space == "imagenet" and found.right == "one" and found.candidates is None
    train = imagenet(tmp_path, "train")
    assert train.labels[:, 0].tolist() == [TENCH, TENCH, KIT_FOX, KIT_FOX]
    assert train.images.key(2) == "n02119789/n02119789_0.JPEG" and train.digest != found.digest
    assert imagenet(tmp_path / "imagenet").labels.tolist() == found.labels.tolist()  # the root itself


def test_a_flat_folder_needs_its_labels(tmp_path: Path) -> None:
    """Catches a flat folder read with labels of its own invention, and a message that does not say what is
    needed."""
    base = fixtures.make_imagenet(tmp_path)
    devkit = base / "ILSVRC2012_devkit_t12" / "data"
    truth = devkit / "ILSVRC2012_validation_ground_truth.txt"
    lines = truth.read_text()
    truth.write_text("1000\n1\n")
    with pytest.raises(ValueError, match="labels of 2 images and none of number 3"):
        imagenet(tmp_path)
    truth.write_text("1000\n1\n2\n999\n")
    with pytest.raises(ValueError, match="line 4: '999' is no class number"):
        imagenet(tmp_path)
    truth.write_text(lines)
    (devkit / "meta.mat").write_bytes((devkit / "meta.mat").read_bytes()[:200])
    with pytest.raises(ValueError, match="meta.mat is not the devkit's table"):
        imagenet(tmp_path)
    (devkit / "meta.mat").unlink()
    with pytest.raises(MissingData, match="meta.mat does not exist"):
        imagenet(tmp_path)
    truth.unlink()
    with pytest.raises(MissingData) as error:
        imagenet(tmp_path)
    for part in (str(truth), "LOC_val_solution.csv", "image-net.org", "val/<WordNet id>"):
        assert part in str(error.value)


def test_folders_and_files_that_do_not_belong_are_named(tmp_path: Path) -> None:
    """Catches a folder that is no class taken for one, which would shift every class after it, and missing
    data without the path that was looked for."""
    with pytest.raises(MissingData) as error:
        imagenet(tmp_path, "train")
    assert str(tmp_path / "imagenet" / "train") in str(error.value)
    base = fixtures.make_imagenet(tmp_path, "folders")
    put(base / "train" / "n00000001" / "a.JPEG", encoded(0))
    with pytest.raises(ValueError, match="train/n00000001 is no WordNet id"):
        imagenet(tmp_path, "train")
    put(base / "val" / WNIDS[TENCH] / "cat.JPEG", encoded(0))
    imagenet(tmp_path)  # its folder says what it is
    fixtures.make_imagenet_real(tmp_path)
    with pytest.raises(ValueError, match="cat.JPEG is not called"):
        imagenet_real(tmp_path)


@pytest.mark.parametrize("layout", ["flat", "folders"])
def test_real_labels_belong_to_images_by_number(tmp_path: Path, layout: str) -> None:
    """Catches ReaL's lists given to images in the order of class folders, and an image without labels left
    out of the images, so that the features of ImageNet could not be used for it."""
    fixtures.make_imagenet(tmp_path, layout)
    fixtures.make_imagenet_real(tmp_path)
    found = imagenet_real(tmp_path)
    assert found.labels.tolist() == [[DUMBBELL, GOLDFISH], [-1, -1], [212, -1], [KIT_FOX, -1]]
    assert found.right == "any" and found.digest == imagenet(tmp_path).digest


def test_a_damaged_real_list_is_refused(tmp_path: Path) -> None:
    """Catches a list that is cut off, too short, or of other classes."""
    fixtures.make_imagenet(tmp_path)
    with pytest.raises(MissingData, match="imagenet/real.json does not exist"):
        imagenet_real(tmp_path)
    path = fixtures.make_imagenet_real(tmp_path)
    text = path.read_text()
    for damaged, message in (
        (text[:-4], "real.json cannot be read"),
        ("[[1], [2], []]", "labels of 3 images; there is image 4"),
        ("[[1], [1000], [], []]", "no list of lists of class numbers"),
        ('{"a": 1}', "no list of lists"),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            imagenet_real(tmp_path)


def test_v2_folders_are_numbers(tmp_path: Path) -> None:
    """Catches class folders numbered by their place among strings: 10 would come before 2."""
    base = fixtures.make_imagenet_v2(tmp_path)
    found = imagenet_v2(tmp_path)
    assert found.labels[:, 0].tolist() == [2, 10, 100, 999]
    assert [found.images.key(i).split("/")[0] for i in range(4)] == ["2", "10", "100", "999"]
    assert [found.images.read(i) for i in range(4)] == [encoded(number) for number in (2, 10, 100, 999)]
    put(base / "1000" / "a.jpeg", encoded(0))
    with pytest.raises(ValueError, match="1000 is no class number"):
        imagenet_v2(tmp_path)


def test_the_sets_of_200_classes_have_200_candidates(tmp_path: Path) -> None:
    """Catches folders numbered by their place (accuracy at chance), fewer candidates where a folder is
    missing (accuracy too good), and ImageNet itself taken for ImageNet-A."""
    base = fixtures.make_imagenet_a(tmp_path)
    found = imagenet_a(tmp_path)
    assert found.labels[:, 0].tolist() == [6, 6, 11, 11]
    assert found.candidates is not None and np.array_equal(found.candidates, classes_also_in("a"))
    fixtures.make_imagenet_r(tmp_path)
    other = imagenet_r(tmp_path)
    assert other.labels[:, 0].tolist() == [1, 1, 6, 6] and len(other.class_names) == 1000
    assert other.candidates is not None and np.array_equal(other.candidates, classes_also_in("r"))
    put(base / WNIDS[TENCH] / "a.jpg", encoded(0))
    with pytest.raises(ValueError, match="n01440764 is no WordNet id that belongs here .one of the 200"):
        imagenet_a(tmp_path)
    with pytest.raises(MissingData, match="imagenet-r.*does not exist"):
        imagenet_r(tmp_path / "nowhere")


def test_sketch_and_c_in_their_layouts(tmp_path: Path) -> None:
    """Catches a layout that is not found, ImageNet-C cropped a second time, and the extra corruptions among
    the 15 of mCE."""
    fixtures.make_imagenet_sketch(tmp_path)
    assert imagenet_sketch(tmp_path).labels[:, 0].tolist() == [TENCH, DUMBBELL]
    assert imagenet_sketch(tmp_path / "imagenet-sketch").labels[:, 0].tolist() == [TENCH, DUMBBELL]
    assert len(CORRUPTIONS) == 15 and len(EXTRA_CORRUPTIONS) == 4
    assert not set(CORRUPTIONS) & set(EXTRA_CORRUPTIONS)
    fixtures.make_imagenet_c(tmp_path, ("noise/gaussian_noise", "fog", "extra/spatter"))
    for name in ("gaussian_noise", "fog", "spatter"):
        found = imagenet_c(tmp_path, name, 3)
        assert found.labels[:, 0].tolist() == [KIT_FOX, DUMBBELL], name
        assert found.adjust == Adjust(whole=True) and found.name == f"imagenet-c/{name}/3"
    assert len(imagenet_c_parts(tmp_path)) == 15
    with pytest.raises(MissingData, match="snow"):
        imagenet_c(tmp_path, "snow", 1)
    with pytest.raises(ValueError, match="no corruption 'rain'"):
        imagenet_c(tmp_path, "rain", 1)
    with pytest.raises(ValueError, match="severity is 6"):
        imagenet_c(tmp_path, "fog", 6)
