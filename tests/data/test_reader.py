"""Reading single samples: exactly the bytes that were written, or an error that names shard and key."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import webdataset as wds

from megavit.data.audit import verify
from megavit.data.bad import SampleError
from megavit.data.index import ShardError
from megavit.data.manifest import open_shards, read_manifest
from megavit.data.reader import ShardReader
from tests.data.shards import cache_in, flip_bit, picture, truncate, write_shards
from tests.data.tars import alarm


def read(reader: ShardReader, shard: int, index: int) -> list[bytes]:
    """[png, cls] of a sample."""
    members = reader.members(shard, index)
    return reader.read(shard, index, [members["png"], members["cls"]])


def test_reads_what_webdataset_reads(digits: Path) -> None:
    """Catches another grouping of members into samples than webdataset's, or shards that it cannot read."""
    manifest = open_shards(f"{digits}/train-*.tar")
    reader = ShardReader(manifest)
    theirs = list(wds.WebDataset(manifest.urls[3], shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [reader.key(3, i) for i in range(100)]
    assert [[sample["png"], sample["cls"]] for sample in theirs] == [read(reader, 3, i) for i in range(100)]


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    """Catches damaged bytes handed on: PIL decodes 199 of 200 such JPEGs without a word."""
    manifest = write_shards(tmp_path, shards=1)
    member = manifest.index(0).sample(5)["png"]
    flip_bit(tmp_path / "x-000.tar", member.offset + 30)
    reader = ShardReader(manifest)
    with pytest.raises(SampleError, match=r"x-000\.tar: sample '000005': the checksum of its png differs"):
        read(reader, 0, 5)
    assert read(reader, 0, 4)[0] == picture(4)


def test_what_is_left_of_a_truncated_shard_is_read(tmp_path: Path) -> None:
    """Catches short reads handed on as images, and a whole shard lost for its last samples."""
    manifest = write_shards(tmp_path, shards=1)
    truncate(tmp_path / "x-000.tar", 30_000)
    reader = ShardReader(manifest)
    found = 0
    for i in range(40):
        try:
            found += read(reader, 0, i)[0] == picture(i)
        except SampleError as error:
            assert "cut off" in str(error) and not error.bad.whole_shard
    assert 10 < found < 30


def test_missing_shards_and_indexes_are_whole_shard_errors(tmp_path: Path) -> None:
    """Catches a missing file taken for a bad sample, and one without key and shard in its message."""
    manifest = write_shards(tmp_path, shards=3)
    (tmp_path / "x-000.tar").unlink()
    (tmp_path / "x-001.tar.idx").unlink()
    reader = ShardReader(manifest)
    for shard, words in ((0, "No such file"), (1, "x-001.tar.idx cannot be read")):
        with pytest.raises(SampleError, match=words) as error:
            read(reader, shard, 7)
        assert error.value.bad.whole_shard and f"x-00{shard}.tar" in error.value.bad.url
        assert error.value.bad.key == ("000007" if shard == 0 else "#7")


def test_a_changed_shard_without_checksums_is_refused(tmp_path: Path) -> None:
    """Catches offsets of an old version of a shard used on a new one."""
    manifest = write_shards(tmp_path, shards=1, indexed=False)
    (tmp_path / "x-000.tar").write_bytes((tmp_path / "x-000.tar").read_bytes() + bytes(512))
    with pytest.raises(SampleError, match="bytes, its index says"):
        read(ShardReader(manifest), 0, 0)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    """Catches a run, or `verify`, that waits for ever for a named pipe or reads a device to its end."""
    write_shards(tmp_path, shards=2)
    path = tmp_path / "x-000.tar"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    manifest = read_manifest(tmp_path / "x.manifest.json")
    with alarm():
        with pytest.raises(SampleError, match="cannot be opened: it is not a regular file") as error:
            read(ShardReader(manifest), 0, 0)
        assert error.value.bad.whole_shard
        assert list(verify(manifest, cache_in(tmp_path), 1)) == [
            f"{path}: it is not a regular file (40 samples)"
        ]
        with pytest.raises(ShardError, match=r"x-000\.tar"):
            open_shards(f"{tmp_path}/x-{{000..001}}.tar")
    (tmp_path / "x-001.tar.idx").unlink()
    os.mkfifo(tmp_path / "x-001.tar.idx")
    with (
        alarm(),
        pytest.raises(SampleError, match=r"x-001\.tar\.idx cannot be read: it is not a regular file"),
    ):
        read(ShardReader(manifest), 1, 0)


def test_a_member_larger_than_memory_is_a_bad_sample(tmp_path: Path) -> None:
    """Catches `verify` or a run that ends because an index states an absurd size."""
    reader = ShardReader(write_shards(tmp_path, shards=1))
    member = reader.members(0, 0)["png"]._replace(size=1 << 60)
    with pytest.raises(SampleError, match="its png of 1152921504606846976 bytes does not fit into memory"):
        reader.read(0, 0, [member])


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a descriptor per shard: a run over 400,000 shards would end at the limit."""
    monkeypatch.setattr("megavit.data.reader._MAX_OPEN", 2)
    manifest = write_shards(tmp_path)
    reader = ShardReader(manifest)
    before = len(os.listdir("/proc/self/fd"))
    for shard in (0, 1, 2, 3, 4, 5, 0, 1):
        read(reader, shard, 0)
    assert len(os.listdir("/proc/self/fd")) - before <= 4  # two shards, two mapped indexes
    assert read(pickle.loads(pickle.dumps(reader)), 2, 1)[0] == picture(81)
    reader.close()


def test_a_lost_handle_is_opened_again(tmp_path: Path) -> None:
    """Catches a sample given up because a network file system dropped a handle."""
    manifest = read_manifest(write_and_path(tmp_path))
    reader = ShardReader(manifest)
    read(reader, 0, 0)
    os.close(next(iter(reader._files._values.values())))  # what a stale handle looks like: EBADF
    reader._files._drop = lambda file: None
    assert read(reader, 0, 1)[0] == picture(1)


def write_and_path(folder: Path) -> Path:
    write_shards(folder, shards=1)
    return folder / "x.manifest.json"
