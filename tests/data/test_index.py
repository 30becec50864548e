"""Indexing real tar files of every dialect, and refusing damaged ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from megavit.data.index import ShardError, ShardReader, expand_shards, index_shard, index_shards, walk_tar


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(count: int, prefix: str = "") -> dict[str, bytes]:
    members = {}
    for i in range(count):
        members[f"{prefix}{i:04d}.png"] = bytes([i]) * (600 + i)
        members[f"{prefix}{i:04d}.cls"] = str(i).encode()
    return members


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "deep/" * 15, "ümlaut/" + "x" * 90])
def test_reads_what_was_written(tmp_path: Path, format: int, prefix: str) -> None:
    """Catches offsets that miss the data behind PAX and GNU long-name headers."""
    members = sample_members(5, prefix)
    if format == tarfile.USTAR_FORMAT and "ü" in prefix:
        members = sample_members(5, "umlaut/")
    index = index_shard(write_tar(tmp_path / "a.tar", members, format))
    reader = ShardReader([index])
    assert len(index) == 5
    for i, key in enumerate(index.keys):
        assert reader.read(0, i) == (members[f"{key}.png"], members[f"{key}.cls"])


def test_agrees_with_webdataset(digits: Path) -> None:
    """Catches another grouping of members into samples than webdataset's, or shards that it cannot read."""
    path = expand_shards(str(digits / "train-*.tar"))[3]
    index = index_shard(path)
    reader = ShardReader([index])
    theirs = list(wds.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == list(index.keys)
    assert [(sample["png"], sample["cls"]) for sample in theirs] == [
        reader.read(0, i) for i in range(len(index))
    ]


def test_patterns_expand_in_order(digits: Path) -> None:
    """Catches braces and wildcards taken literally, and a shard counted twice."""
    braces = expand_shards(f"{digits}/train-{{000002..000004}}.tar")
    assert [Path(p).name for p in braces] == ["train-000002.tar", "train-000003.tar", "train-000004.tar"]
    assert len(expand_shards(f"{digits}/train-*.tar")) == 15
    assert sum(map(len, index_shards(f"{digits}/t*.tar"))) == 1797


@pytest.mark.parametrize("pattern", ["none-*.tar", "train-{000013..000016}.tar"])
def test_missing_shards_are_named(digits: Path, pattern: str) -> None:
    """Catches training on whatever happens to be there."""
    with pytest.raises(ShardError, match=r"none-\*|train-000015"):
        expand_shards(f"{digits}/{pattern}")


def damaged(tmp_path: Path, change: str) -> Path:
    path = write_tar(tmp_path / "bad.tar", sample_members(10))
    data = bytearray(path.read_bytes())
    header = walk_tar(path)[8][1] - 512  # in mid shard
    if change == "header":
        data[header : header + 512] = b"\xff" * 512
    elif change == "zeroed header":
        data[header : header + 512] = bytes(512)
    elif change == "member boundary":
        del data[header:]
    elif change == "inside a member":
        del data[header + 700 :]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("change", ["header", "zeroed header", "member boundary", "inside a member"])
def test_damage_is_an_error_where_tarfile_stops_in_silence(tmp_path: Path, change: str) -> None:
    """Catches the silent loss of the rest of a shard, which webdataset and tarfile show."""
    path = damaged(tmp_path, change)
    with pytest.raises(ShardError, match=r"bad\.tar is (damaged|truncated)"):
        index_shard(path)


def test_repeated_names_are_refused(tmp_path: Path) -> None:
    """Catches samples that replace each other in silence."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"1", b"22"):
            info = tarfile.TarInfo("same.cls")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ShardError, match="'same.cls' appears twice"):
        index_shard(path)


def test_incomplete_samples_and_empty_shards_are_named(tmp_path: Path) -> None:
    """Catches images trained without their label."""
    members = sample_members(3)
    del members["0001.cls"]
    with pytest.raises(ShardError, match=r"'0001' has \['png'\]"):
        index_shard(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ShardError, match="holds no samples"):
        index_shard(write_tar(tmp_path / "b.tar", {}))


def test_file_that_shrank_after_indexing_is_noticed(tmp_path: Path) -> None:
    """Catches short reads handed on as images."""
    path = write_tar(tmp_path / "a.tar", sample_members(4))
    reader = ShardReader([index_shard(path)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match="'0003' is cut off"):
        reader.read(0, 3)


def test_reader_keeps_few_files_open(digits: Path) -> None:
    """Catches a descriptor per shard: a run over 400,000 shards would end at the limit."""
    reader = ShardReader(index_shards(f"{digits}/train-*.tar"), max_open=2)
    for shard in (0, 1, 2, 0, 5):
        reader.read(shard, 0)
    assert list(reader._files) == [0, 5]
