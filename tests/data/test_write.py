"""Shard writers on fixtures in the data sets' true on-disk formats."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from megavit.data import write
from megavit.data.bad import BadSamples, SampleError
from megavit.data.config import DataConfig
from megavit.data.manifest import expand_shards, open_shards
from megavit.data.reader import ShardReader
from megavit.data.samples import Samples
from megavit.model.config import ModelConfig
from tests.data.shards import labelled


def contents(pattern: str) -> list[tuple[bytes, int]]:
    manifest = open_shards(pattern)
    reader = ShardReader(manifest)
    found = []
    for shard in range(len(manifest)):
        for index in range(int(manifest.samples[shard])):
            members = reader.members(shard, index)
            image = next(member for name, member in members.items() if name not in ("cls", "source.txt"))
            data, label = reader.read(shard, index, [image, members["cls"]])
            found.append((data, int(label)))
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_digits_split_is_the_first_1437_and_the_last_360(digits: Path) -> None:
    """Catches another split, pixel scale or order than the baselines are measured on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = contents(f"{digits}/train-*.tar"), contents(f"{digits}/test-*.tar")
    assert (len(train), len(test)) == (1437, 360)
    assert [label for _, label in train + test] == data.target.tolist()
    for i in (0, 700, 1436):
        assert np.array_equal(np.round(pixels(train[i][0]) / 255 * 16), data.images[i])


def test_holdout_comes_from_the_training_part() -> None:
    """Catches settings chosen on the test split."""
    sizes = {split.name: split.size for split in write.digits_splits(holdout=200)}
    assert sizes == {"train": 1237, "val": 200, "test": 360}
    with pytest.raises(ValueError, match="holdout"):
        write.digits_splits(holdout=1437)


def test_baselines_are_those_of_the_split() -> None:
    """Catches baselines measured on other data; 1-NN is deterministic."""
    found = write.digits_baselines()["results"]
    assert found["1-nearest neighbour"] == pytest.approx(344 / 360)
    assert set(found) == {"logistic regression", "1-nearest neighbour", "SVC, RBF kernel"}


def cifar_fixture(root: Path, classes: int) -> np.ndarray:
    """A small data set in CIFAR's format: python-2 style pickles with bytes keys, rows of 3072 in CHW
    order."""
    rng = np.random.default_rng(0)
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    rows = rng.integers(0, 256, (len(names), 4, 3072), dtype=np.uint8)
    for n, name in enumerate(names):
        labels = [(n * 4 + i) % classes for i in range(4)]
        batch: dict[bytes, object] = {
            b"data": rows[n],
            b"filenames": [b"x.png"] * 4,
            b"batch_label": name.encode(),
        }
        batch |= {b"labels": labels} if classes == 10 else {b"fine_labels": labels, b"coarse_labels": [0] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    name, key = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
    meta = {key: [b"class %d" % i for i in range(classes)], b"coarse_label_names": [b"coarse"]}
    (folder / name).write_bytes(pickle.dumps(meta, protocol=2))
    return rows


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    """Catches CHW rows read as HWC, coarse labels (and their names) taken for fine ones, and batches out of
    order."""
    rows = cifar_fixture(tmp_path, classes)
    paths = write.write_splits(
        write.cifar_splits(tmp_path, classes), tmp_path / "out", shard_size=8, workers=2
    )
    train, test = contents(f"{tmp_path}/out/train-*.tar"), contents(f"{tmp_path}/out/test-*.tar")
    assert write.cifar_class_names(tmp_path, classes) == [f"class {i}" for i in range(classes)]
    assert len(paths) == (4 if classes == 10 else 2)
    assert [label for _, label in train + test] == [i % classes for i in range(len(train) + len(test))]
    expected = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert all(
        np.array_equal(pixels(data), image) for (data, _), image in zip(train + test, expected, strict=True)
    )


def test_cifar_errors_name_the_file(tmp_path: Path) -> None:
    """Catches a KeyError, and code run from a hostile pickle."""
    with pytest.raises(ValueError, match="data_batch_1 is missing"):
        write.cifar_splits(tmp_path, 10)
    cifar_fixture(tmp_path, 10)
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    bad.write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}))
    with pytest.raises(ValueError, match=r"data_batch_2.*\(2, 5\)"):
        write.cifar_splits(tmp_path, 10)
    bad.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="data_batch_2.*posix"):
        write.cifar_splits(tmp_path, 10)


def folder_fixture(root: Path) -> None:
    for split, classes in {"train": ["cat", "dog"], "val": ["dog"]}.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 7), (i, len(name), 0)).save(
                    root / split / name / f"{split}{name}{i}.JPEG", "JPEG"
                )
    (root / "train" / "cat" / "notes.txt").write_text("not an image")


def test_imagefolder(tmp_path: Path) -> None:
    """Catches re-encoded files, class ids that differ between splits, and shards of one class each."""
    folder_fixture(tmp_path / "in")
    write.write_splits(write.folder_splits(tmp_path / "in"), tmp_path / "out", shard_size=4, workers=1)
    train, val = contents(f"{tmp_path}/out/train-*.tar"), contents(f"{tmp_path}/out/val-*.tar")
    originals = {path.read_bytes(): int("dog" in path.name) for path in (tmp_path / "in").rglob("*.JPEG")}
    assert dict(train + val) == originals
    assert sorted(label for _, label in train) == [0, 0, 0, 1, 1, 1]
    assert [label for _, label in val] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"holds no images \(jpg.*there are 4 .json \(.*; 3 .tar"):
        write.folder_splits(tmp_path / "out")
    with pytest.raises(ValueError, match="not a folder"):
        write.folder_splits(tmp_path / "nowhere")


def test_imagefolder_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Catches photos that are dropped without a word because of their extension or their place."""
    folder_fixture(tmp_path)
    for i in range(5):
        Image.new("L", (4, 4)).save(tmp_path / "train" / "dog" / f"d{i}.GIF")
    Image.new("L", (4, 4)).save(tmp_path / "train" / "cat" / "c.tiff")
    Image.new("L", (4, 4)).save(tmp_path / "train" / "lost.png")
    train, val = write.folder_splits(tmp_path)
    assert train.size == 6 and len(train.left_out) == 8
    assert train.note_left_out() == (
        "note: train: left out 5 .gif (train/dog/d0.GIF, train/dog/d1.GIF, train/dog/d2.GIF, ...); "
        "1 outside the class folders (train/lost.png); 1 .tiff (train/cat/c.tiff); "
        "1 .txt (train/cat/notes.txt)"
    )
    assert val.left_out == () and val.note_left_out() == ""


def test_a_sample_knows_the_file_that_it_was_made_from(tmp_path: Path) -> None:
    """Catches a problem in a shard that leads to no photo, and a member that plain webdataset cannot read."""
    folder_fixture(tmp_path / "in")
    (tmp_path / "in" / "train" / "cat" / "caf\u00e9 1.jpg").write_bytes(b"\xff\xd8 no image")
    write.write_splits(write.folder_splits(tmp_path / "in"), tmp_path / "out", shard_size=9, workers=1)
    sources = {}
    for sample in wds.WebDataset(f"{tmp_path}/out/train-000000.tar", shardshuffle=False):
        image = sample.get("jpeg", sample.get("jpg"))
        assert (tmp_path / "in" / sample["source.txt"].decode()).read_bytes() == image
        sources[sample["__key__"]] = sample["source.txt"].decode()
    assert len(sources) == 7
    manifest = open_shards(f"{tmp_path}/out/train.manifest.json")
    fields = labelled(ModelConfig(image_size=28), DataConfig(), allow_none=False)
    samples = Samples(manifest, fields, DataConfig())
    batch = samples.batch([0] * 7, range(7), 7, None)
    (bad,) = batch.bad
    assert bad.source == sources[bad.key] == "train/cat/caf\u00e9 1.jpg"
    assert "made from 'train/cat/caf\u00e9 1.jpg'" in str(SampleError(bad))
    records: list[dict[str, object]] = []
    account = BadSamples(1.0, 1, 7, lambda **fields: records.append(fields))
    account.record(1, [bad, bad._replace(source="")])
    assert records[0]["source"] == bad.source and "source" not in records[1]


def test_interrupted_writing_is_continued(tmp_path: Path) -> None:
    """Catches a half-written shard under its final name, and finished shards written again."""
    splits = write.digits_splits()
    first = write.write_splits(splits, tmp_path, shard_size=500, workers=1)
    times = {path: path.stat().st_mtime_ns for path in first}
    first[1].unlink()

    def broken(i: int) -> tuple[bytes, str, int]:
        if i == 700:
            raise OSError("disk is gone")
        return splits[0].load(i)

    import dataclasses

    with pytest.raises(OSError, match="disk is gone"):
        write.write_splits([dataclasses.replace(splits[0], load=broken)], tmp_path, shard_size=500, workers=1)
    assert not first[1].exists() and not list(tmp_path.glob("*.partial"))
    write.write_splits(splits, tmp_path, shard_size=500, workers=1)
    assert len(contents(f"{tmp_path}/train-*.tar")) == 1437
    assert first[0].stat().st_mtime_ns == times[first[0]]


def test_other_content_is_not_mixed_in(tmp_path: Path) -> None:
    """Catches shards of two data sets, or of two shard sizes, in one folder."""
    write.write_splits(write.digits_splits(), tmp_path, shard_size=500, workers=1)
    with pytest.raises(ValueError, match="other data or another shard size"):
        write.write_splits(write.digits_splits(), tmp_path, shard_size=400, workers=1)
    with pytest.raises(ValueError, match="other data or another shard size"):
        write.write_splits(write.digits_splits(holdout=100), tmp_path, shard_size=500, workers=1)
    assert len(expand_shards(f"{tmp_path}/*.tar")) == 4
