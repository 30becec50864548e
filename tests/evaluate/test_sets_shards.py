"""WebDataset shards as sets of images, and a folder of one's own data."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from megavit.data.bad import SampleError
from megavit.data.manifest import open_shards, write_index
from megavit.evaluate.sets.image_set import MissingData
from megavit.evaluate.sets.shards import own_data, shard_set
from tests.evaluate import fixtures
from tests.evaluate.fixtures import encoded, put


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    """A shard of the samples, with keys from `first` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, first):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def picture(number: int) -> bytes:
    return encoded(number, "PNG", (8, 8))


def test_shards_give_images_and_labels_in_their_order(tmp_path: Path) -> None:
    """Catches an image of the neighbouring shard at a boundary, and a set that does not travel to workers."""
    fixtures.make_shards(tmp_path)
    by_pattern = shard_set(f"{tmp_path}/train-*.tar", "digits", "train")
    found = shard_set(f"{tmp_path}/train.manifest.json", "digits", "train")
    assert found.labels[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0] and found.right == "one"
    assert found.class_names == ("zero", "one", "two")
    keys = [found.images.key(i) for i in range(7)]
    assert keys[3:5] == ["train-000000.tar/train_000000003", "train-000001.tar/train_000000004"]
    with tarfile.open(tmp_path / "train-000001.tar") as tar:
        member = tar.extractfile("train_000000004.png")
        assert member and member.read() == found.images.read(4)
    travelled = pickle.loads(pickle.dumps(found.images))
    assert [travelled.read(i) for i in range(7)] == [by_pattern.images.read(i) for i in range(7)]
    assert found.digest == by_pattern.digest  # the indexes beside the shards have checksums


def test_several_labels_make_a_multi_label_set(tmp_path: Path) -> None:
    """Catches the second label dropped, and a list without labels called bad where none applies."""
    lists = (b"[2, 0]", b'{"labels": [1]}', b"[]", b"[1, 1]")
    shard = write_tar(tmp_path / "a.tar", [{"png": picture(i), "json": text} for i, text in enumerate(lists)])
    found = shard_set(str(shard), "mine", "test", ("a", "b", "c"))
    assert found.right == "all" and found.labels.tolist() == [[0, 2], [1, -1], [-1, -1], [1, -1]]
    assert found.images.read(2) == picture(2)
    ones = write_tar(tmp_path / "b.tar", [{"png": picture(i), "json": b"[1]"} for i in range(3)])
    assert shard_set(str(ones), "mine", "test", ("a", "b")).right == "one"
    assert shard_set(str(ones), "mine", "test", ("a", "b"), multi_label=True).right == "all"


def test_a_sample_without_a_usable_label_is_bad_and_named(tmp_path: Path) -> None:
    """Catches one such sample ending an evaluation, or being scored as class -1."""
    samples = [{"png": picture(i), "cls": b"1"} for i in range(7)]
    samples[1]["cls"] = b"7"
    samples[2]["cls"] = b"cat"
    del samples[3]["cls"]
    samples[4] = {"cls": b"0"}
    samples[5] = {"png": picture(5), "json": b"[0, 1"}
    shard = write_tar(tmp_path / "a.tar", samples)
    found = shard_set(str(shard), "mine", "test", ("a", "b"))
    assert found.labels[:, 0].tolist() == [1, -1, -1, -1, 0, -1, 1]
    for number, reason in (
        (1, "label 7 is outside 0..1"),
        (2, "not a class number"),
        (3, "no cls or json"),
        (4, "no jpg or"),
        (5, "cannot be parsed"),
    ):
        with pytest.raises(SampleError, match=f"sample '{number:04d}'.*{reason}"):
            found.images.read(number)
    assert found.images.read(6) == picture(6)


def test_classes_of_other_data_are_refused(tmp_path: Path) -> None:
    """Catches a set whose labels are nearly all outside the classes evaluated on the few that are not."""
    shard = write_tar(tmp_path / "a.tar", [{"png": picture(i), "cls": str(i).encode()} for i in range(40)])
    with pytest.raises(ValueError, match=r"38 of the 40 samples of .*label 2 is outside 0..1"):
        shard_set(str(shard), "mine", "test", ("a", "b"))
    with pytest.raises(MissingData, match="classes.txt does not exist"):
        shard_set(str(shard), "mine", "test")


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    """Catches changed images that meet the features of the old ones: of the same sizes, with checksums and
    without."""

    def write(name: str, seed: int, indexed: bool) -> str:
        raw = [{"jpg": bytes([seed + i] * 50), "cls": b"0"} for i in range(3)]
        shard = write_tar(tmp_path / name / "a.tar", raw)
        if indexed:
            write_index(shard, f"{shard}.idx")
        assert open_shards(str(shard)).num_samples == 3
        return shard_set(str(shard), "mine", "test", ("a",)).digest

    assert write("x", 0, True) == write("y", 0, True) != write("z", 1, True)
    first = write("p", 0, False)
    os.utime(tmp_path / "p" / "a.tar", (1, 1))
    again = shard_set(str(tmp_path / "p" / "a.tar"), "mine", "test", ("a",)).digest
    assert first != again == shard_set(str(tmp_path / "p" / "a.tar"), "mine", "test", ("a",)).digest


def test_own_data_are_shards_or_folders(tmp_path: Path) -> None:
    """Catches val read where test is, a set without val, and splits of which one has several labels."""
    fixtures.make_shards(tmp_path / "shards")
    found = own_data(tmp_path / "shards")
    assert {split: (one.split, len(one)) for split, one in found.items()} == {
        "train": ("train", 7),
        "test": ("test", 7),
    }
    for index in (*(tmp_path / "shards").glob("*.json"), *(tmp_path / "shards").glob("*.idx")):
        index.unlink()
    assert own_data(tmp_path / "shards")["test"].labels.tolist() == found["test"].labels.tolist()
    fixtures.make_image_folder(tmp_path / "images")
    assert {split: len(one) for split, one in own_data(tmp_path / "images").items()} == {
        "train": 6,
        "test": 2,
    }
    folder = tmp_path / "several"
    put(folder / "classes.txt", "a\nb\n")
    write_tar(folder / "train-0.tar", [{"png": picture(0), "json": b"[0, 1]"}])
    write_tar(folder / "val-0.tar", [{"png": picture(1), "json": b"[1]"}, {"png": picture(2), "json": b"[]"}])
    mixed = own_data(folder)
    assert {one.right for one in mixed.values()} == {"all"}
    assert mixed["test"].labels.tolist() == [[1], [-1]] and mixed["test"].images.read(1) == picture(2)


def test_own_data_that_are_not_there(tmp_path: Path) -> None:
    """Catches an empty or missing folder that gives no sets, and no word about it."""
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MissingData, match=r"Expected: \{train,test or val\}.manifest.json"):
            own_data(folder)
