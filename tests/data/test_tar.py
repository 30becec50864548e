"""Walking tar headers that state what cannot be true: an error with the place, never a walk without end."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from megavit.data.index import index_shard
from megavit.data.tar import ShardError, walk_tar
from tests.data.tars import END, alarm, header, member, padded, pax, record, sample

MIB = 1 << 20


def shard(folder: Path, *parts: bytes) -> Path:
    path = folder / "odd.tar"
    path.write_bytes(b"".join(parts))
    return path


ODD = {
    "negative size": ([header("b.png", -512)], "a size of -512 bytes in the header at byte 2048"),
    "negative size in octal": ([header("b.png", b"-0000001000\0")], "a size of -512 bytes"),
    "huge size": ([header("b.png", 1 << 80)], r"'b.png' \(header at byte 2048\) ends past its 3584 bytes"),
    "negative PAX size": ([pax(record("size", "-1024")), header("b.png")], "the size '-1024' for the member"),
    "PAX size back to the header": ([pax(record("size", "-512")), header("b.png")], "at byte 3072"),
    "huge PAX size": ([pax(record("size", "9" * 30)), header("b.png")], "states the size '999"),
    "very long PAX size": ([pax(record("size", "9" * 9999)), header("b.png")], "states the size '999"),
    "PAX size past the end": ([pax(record("size", "99999")), header("b.png")], "ends past its"),
    "PAX size in words": ([pax(record("size", "abc")), header("b.png")], "the size 'abc' for the member"),
    "PAX size with a fraction": ([pax(record("size", "1_0")), header("b.png")], "the size '1_0'"),
    "empty PAX size": ([pax(record("size", "")), header("b.png")], "the size '' for the member"),
    "PAX record without length": ([pax(b"size=3\n"), header("b.png")], "bad PAX header at byte 2560"),
    "PAX record of no length": ([pax(b"0 a=b\n"), header("b.png")], "bad PAX header at byte 2560"),
    "PAX record longer than the header": ([pax(b"99 a=b\n"), header("b.png")], "bad PAX header at byte 2560"),
    "second PAX record": (
        [pax(record("a", "b") + b"-6 a=b\n"), header("b.png")],
        "bad PAX header at byte 2566",
    ),
    "PAX record without value": ([pax(b"6 abc\n"), header("b.png")], "bad PAX header"),
    "PAX key that is no UTF-8": ([pax(b"7 \xff\xff=b\n"), header("b.png")], "bad PAX header"),
    "PAX header longer than the file": ([header("pax", 9999, tarfile.XHDTYPE)], "ends past its"),
    "long name longer than the file": ([header("x", 9999, tarfile.GNUTYPE_LONGNAME)], "ends past its"),
    "huge PAX header": (
        [pax(bytes(2 * MIB))],
        f"an extended header of {2 * MIB} bytes at byte 2048, more than {MIB}",
    ),
    "huge long name": (
        [pax(b"n" * 2 * MIB, tarfile.GNUTYPE_LONGNAME)],
        "an extended header of 2097152 bytes",
    ),
    "size for all members": ([pax(record("size", "1"), tarfile.XGLTYPE), sample("b")], "sets 'size' for all"),
    "old sparse file": ([header("b.png", 0, tarfile.GNUTYPE_SPARSE)], "'b.png'.*stored as a sparse file"),
    "new sparse file": ([pax(record("GNU.sparse.major", "1")), member("b.png", b"x")], "a sparse file"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_true_is_an_error_with_its_place(tmp_path: Path, name: str) -> None:
    """Catches a walk that turns in a circle or fills the memory, and errors of other kinds: ValueError,
    UnicodeDecodeError, MemoryError."""
    parts, words = ODD[name]
    path = shard(tmp_path, sample(), *parts, END)
    with alarm(), pytest.raises(ShardError, match=words) as caught:
        walk_tar(path)
    assert "odd.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_many_records_take_no_time(tmp_path: Path) -> None:
    """Catches records that are cut off one by one: 170,000 copies of the rest of a megabyte are 90 GB."""
    with alarm():
        path = shard(tmp_path, pax(b"6 a=b\n" * (MIB // 6)), sample(), END)
        assert [name for name, _, _ in walk_tar(path)] == ["a.png", "a.cls"]
        path = shard(tmp_path, *(member(f"img.{i}.png", b"") for i in range(5_000)), END)
        with pytest.raises(ShardError, match="5000 different extensions .*first dot"):
            index_shard(path)


@pytest.mark.parametrize("long_name", [False, True])
def test_overrides_are_for_the_next_member(tmp_path: Path, long_name: bool) -> None:
    """Catches a name or size taken for another member than webdataset takes it, and names cut or decoded
    otherwise."""
    name = "f/" + "ü" * 80 + "\udcff.png"
    if long_name:
        extended = pax(name.encode("utf-8", "surrogateescape") + b"\0rest", tarfile.GNUTYPE_LONGNAME)
    else:
        extended = pax(record("size", "3") + record("path", name) + record("mtime", "1.5"))
    link = pax(b"n" * 5000, tarfile.GNUTYPE_LONGLINK)
    parts = [link, extended, header("x.png", 3), padded(b"123"), member("a.cls", b"1"), END]
    path = shard(tmp_path, pax(record("comment", "git"), tarfile.XGLTYPE), *parts)
    with tarfile.open(path, encoding="utf-8") as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert walk_tar(path) == expected and expected[0][0] == name


def test_the_first_of_two_names_counts(tmp_path: Path) -> None:
    """Catches another order of precedence than tarfile's."""
    path = shard(
        tmp_path, pax(record("path", "one.png")), pax(record("path", "two.png")), member("x.png", b"1"), END
    )
    with tarfile.open(path) as tar:
        assert [name for name, _, _ in walk_tar(path)] == tar.getnames() == ["one.png"]
    assert [s["__key__"] for s in wds.WebDataset(str(path), shardshuffle=False)] == ["one"]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing"])
def test_only_regular_files_are_shards(tmp_path: Path, kind: str) -> None:
    """Catches reading /dev/zero for ever, and waiting for ever for the other end of a named pipe."""
    path = {"device": Path("/dev/zero"), "folder": tmp_path}.get(kind, tmp_path / "x.tar")
    if kind == "fifo":
        os.mkfifo(path)
    words = "No such file" if kind == "missing" else "it is not a regular file"
    with alarm(), pytest.raises(ShardError, match=f"shard {path} cannot be read: {words}"):
        index_shard(path)


def test_an_open_file_is_left_open(tmp_path: Path) -> None:
    """Catches a descriptor that is closed under its owner."""
    path = shard(tmp_path, sample(), END)
    with open(path, "rb") as file:
        assert index_shard(file.fileno(), name="x").to_bytes() == index_shard(path).to_bytes()
        file.seek(0)
        assert file.read() == path.read_bytes()
