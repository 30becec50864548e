"""Indexing real tar files of every dialect, and refusing damaged ones."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset as wds

from megavit.data.index import ShardError, ShardIndex, index_shard, read_index, walk_tar


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


def contents(path: Path, index: ShardIndex) -> dict[str, dict[str, bytes]]:
    """key -> extension -> bytes, read through the index."""
    data = path.read_bytes()
    return {
        index.key(i): {name: data[m.offset : m.offset + m.size] for name, m in index.sample(i).items()}
        for i in range(len(index))
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "deep/" * 15, "ümlaut/" + "x" * 90])
def test_finds_what_was_written(tmp_path: Path, format: int, prefix: str) -> None:
    """Catches offsets that miss the data behind PAX and GNU long-name headers."""
    members = sample_members(5, prefix)
    if format == tarfile.USTAR_FORMAT and "ü" in prefix:
        members = sample_members(5, "umlaut/")
    path = write_tar(tmp_path / "a.tar", members, format)
    found = contents(path, index_shard(path))
    assert {
        f"{key}.{name}": data for key, sample in found.items() for name, data in sample.items()
    } == members
    assert [index_shard(path).sample(3)[name].crc32 for name in ("png", "cls")] == [
        zlib.crc32(found_data) for found_data in list(found.values())[3].values()
    ]


def test_agrees_with_webdataset_on_odd_names(tmp_path: Path) -> None:
    """Catches another grouping of members, splitting of extensions or skipping of meta data than
    webdataset's."""
    members = {
        "__meta__/info.json": b"{}",
        "a/img.v2.jpg": b"1",
        "a/img.cls": b"2",
        "A.JPG": b"3",
        "A.cls": b"4",
        "b.cls": b"5",
        "c.jpg": b"6",
        "b.jpg": b"7",
        "without_extension": b"8",
        "__d.cls": b"9",
    }
    path = write_tar(tmp_path / "a.tar", members)
    theirs = [
        (s["__key__"], {name: data for name, data in s.items() if not name.startswith("__")})
        for s in wds.WebDataset(str(path), shardshuffle=False)
    ]
    data, index = path.read_bytes(), index_shard(path)
    ours = [
        (index.key(i), {n: data[m.offset : m.offset + m.size] for n, m in index.sample(i).items()})
        for i in range(len(index))
    ]
    assert ours == theirs and len(ours) == 6


def test_links_and_folders_with_a_size_are_skipped(tmp_path: Path) -> None:
    """Catches a walk that jumps over data which tar says a link has, but has not."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("dir", tarfile.DIRTYPE),
            ("link.jpg", tarfile.LNKTYPE),
            ("x.cls", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "x.cls", 700
            tar.fileobj.write(info.tobuf(tarfile.USTAR_FORMAT))
            tar.offset += 512
            if kind == tarfile.REGTYPE:
                tar.fileobj.write(b"7".ljust(1024, b"\0"))
                tar.offset += 1024
    assert [(name, size) for name, _, size in walk_tar(path)] == [("x.cls", 700)]


def test_index_file_says_the_same(tmp_path: Path) -> None:
    """Catches a byte order, alignment or key table that does not survive the file."""
    path = write_tar(tmp_path / "a.tar", sample_members(7, "ümlaut/"), tarfile.PAX_FORMAT)
    index = index_shard(path)
    (tmp_path / "a.idx").write_bytes(index.to_bytes())
    again = read_index(tmp_path / "a.idx")
    assert contents(path, again) == contents(path, index)
    assert again.digest == index.digest and again.shard_bytes == path.stat().st_size


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "other"])
def test_damaged_index_files_are_named(tmp_path: Path, change: str) -> None:
    """Catches offsets from a damaged index taken for good."""
    data = bytearray(index_shard(write_tar(tmp_path / "a.tar", sample_members(7))).to_bytes())
    if change == "flip":
        data[len(data) // 2] ^= 4
    data = {"cut": data[:-5], "empty": b"", "other": b"not an index\n"}.get(change, data)
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.idx"):
        read_index(tmp_path / "a.idx")


def test_compressed_shards_are_recognised(tmp_path: Path) -> None:
    """Catches a gzip file called damaged."""
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ShardError, match=r"a\.tar is compressed \(gzip\)"):
        index_shard(path)


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


def test_incomplete_samples_keep_their_place(tmp_path: Path) -> None:
    """Catches a sample without its label that is dropped, which would shift the order, or refused."""
    members = sample_members(3)
    del members["0001.cls"]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert [list(index.sample(i)) for i in range(3)] == [["png", "cls"], ["png"], ["png", "cls"]]
    with pytest.raises(ShardError, match="holds no samples"):
        index_shard(write_tar(tmp_path / "b.tar", {}))
