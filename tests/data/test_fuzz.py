"""Bytes that nobody wrote on purpose: every reader of files returns, or raises its own error.

The examples are the same in every run.
"""

from __future__ import annotations

import contextlib
import io
import json
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megavit.data.decode import DecodeError, Decoder
from megavit.data.index import ShardError, ShardIndex, index_shard
from megavit.data.labels import parse_labels
from megavit.data.manifest import read_manifest
from megavit.data.tar import _pax_records, walk_tar
from tests.data.shards import write_shards
from tests.data.tars import END, alarm, header, member, pax, record, sample

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the folder may be written over and over
)
TARS = [
    sample("a") + sample("b") + END,
    pax(record("size", "6") + record("path", "ü/long.png")) + header("x.png", 6) + bytes(512) + END,
    pax(b"l" * 120 + b".png\0", b"L") + member("x", b"1") + pax(record("comment", "x"), b"g") + END,
]
HEADER_FIELDS = st.sampled_from([0, 100, 124, 135, 148, 156, 157, 257, 345, 500])


def changed(original: bytes, changes: list[tuple[int, bytes]], cut: int) -> bytes:
    """`original` with other bytes at some places, up to `cut`."""
    data = bytearray(original)
    for place, new in changes:
        data[place : place + len(new)] = new[: max(0, len(data) - place)]
    return bytes(data[:cut])


def with_right_checksums(data: bytes) -> bytes:
    """Headers that tar would accept: otherwise no damage gets past the checksum."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and any(block[148:156]):
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


changes = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 4000), st.builds(lambda b, f: 512 * b + f, st.integers(0, 7), HEADER_FIELDS)
        ),
        st.one_of(
            st.binary(min_size=1, max_size=12), st.sampled_from([b"\xff" * 12, b"\x80" + bytes(11), b"-1 "])
        ),
    ),
    max_size=4,
)


@FUZZ
@given(st.one_of(st.binary(max_size=3000), st.builds(with_right_checksums, st.binary(max_size=3000))))
def test_random_bytes_are_no_tar(tmp_path: Path, data: bytes) -> None:
    """Catches an error of another kind, or none at all."""
    walk(tmp_path, data)


@FUZZ
@given(st.sampled_from(TARS), changes, st.integers(0, 6000), st.booleans())
def test_changed_tars_are_walked_or_refused(
    tmp_path: Path, tar: bytes, changes: list[tuple[int, bytes]], cut: int, repair: bool
) -> None:
    """Catches a walk without end, and a member that reaches out of the file."""
    data = changed(tar, changes, cut)
    walk(tmp_path, with_right_checksums(data) if repair else data)


def walk(folder: Path, data: bytes) -> None:
    path = folder / "x.tar"
    path.write_bytes(data)
    with alarm():
        try:
            members = walk_tar(path)
        except ShardError as error:
            assert "x.tar" in str(error) and "\n" not in str(error)
            return
    assert len(members) <= len(data) // 512
    assert all(offset >= 0 and size >= 0 and offset + size <= len(data) for _, offset, size in members)
    try:
        index = index_shard(path)
    except ShardError:
        return
    assert ShardIndex.from_bytes(index.to_bytes(), "x").to_bytes() == index.to_bytes()


@FUZZ
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.builds(
                lambda n, key, value: b"%d %s=%s\n" % (n, key, value),
                st.integers(-9, 99),
                *[st.binary(max_size=9)] * 2,
            )
        ).map(b"".join),
    )
)
def test_pax_records_are_read_or_refused(data: bytes) -> None:
    """Catches records that lead backwards."""
    with alarm():
        try:
            records = _pax_records(data, 512, "x.tar")
        except ShardError as error:
            assert "x.tar is damaged: bad PAX header at byte" in str(error)
        else:
            assert len(records) * 4 <= len(data) and all(isinstance(text, str) for text in records.values())


def encoded(kind: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = [
    encoded("JPEG", "RGB"),
    encoded("JPEG", "RGB", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("PNG", "RGBA"),
    encoded("PNG", "P"),
    encoded("WEBP", "RGBA"),
    encoded("WEBP", "RGB", lossless=True),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@FUZZ
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda start, rest: start + rest,
            st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]),
            st.binary(),
        ),
        st.builds(
            changed,
            st.sampled_from(IMAGES),
            st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=4)), max_size=4),
            st.integers(0, 4000),
        ),
    )
)
def test_images_are_decoded_or_refused(data: bytes) -> None:
    """Catches an error of a library that no handler for bad samples knows, and memory for absurd sizes."""
    row = np.full((2, 8, 8, 3), 77, np.uint8)
    with alarm():
        try:
            Decoder(3, 8, max_pixels=100_000).load(data, lambda width, height: (0, 0, width, height), row[0])
        except DecodeError as error:
            assert str(error) and "\n" not in str(error)
            assert (row[0] == 77).all()
    assert (row[1] == 77).all()


@FUZZ
@given(changes, st.integers(0, 4000), st.booleans())
def test_changed_indexes_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int, repair: bool
) -> None:
    """Catches offsets outside the shard, and numpy's errors."""
    path = tmp_path / "x.tar"
    if not path.exists():
        path.write_bytes(sample("a") + sample("b") + END)
    data = changed(index_shard(path).to_bytes(), changes, cut)
    if repair:  # a digest that fits: nothing but the content itself can tell
        line, newline, payload = data.partition(b"\n")
        # A first line that is no longer a JSON object cannot carry a digest; it is read as it is.
        with contextlib.suppress(ValueError, TypeError):
            fields = json.loads(line) | {"digest": blake2b(payload, digest_size=16).hexdigest()}
            data = json.dumps(fields).encode() + newline + payload
    try:
        index = ShardIndex.from_bytes(data, "x.idx")
    except ShardError as error:
        assert "x.idx" in str(error)
        return
    for number in range(len(index)):
        index.key(number)
        for found in index.sample(number).values():
            assert 0 <= found.offset <= found.offset + found.size <= index.shard_bytes


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "format",
                "digest",
                "urls",
                "samples",
                "bytes",
                "digests",
                "contents",
                "indexes",
                "content_digest",
            ]
        ),
        json_values,
    )
)
def test_manifests_of_any_kind_are_read_or_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    """Catches KeyError, TypeError and OverflowError from what is just another file."""
    path = tmp_path / "x.manifest.json"
    if not path.exists():
        write_shards(tmp_path, shards=2, samples=2)
        (tmp_path / "good").write_bytes(path.read_bytes())
    path.write_text(json.dumps(json.loads((tmp_path / "good").read_text()) | fields))
    try:
        assert read_manifest(path).num_samples >= 0
    except ShardError as error:
        assert "x.manifest.json" in str(error)


@FUZZ
@given(
    st.sampled_from(["cls", "json"]),
    st.one_of(st.binary(), json_values.map(lambda value: json.dumps(value).encode())),
)
def test_labels_are_read_or_refused(extension: str, data: bytes) -> None:
    """Catches an error of another kind, which would end the run."""
    try:
        found = parse_labels(extension, data, 10, allow_none=True)
    except ValueError as error:
        assert type(error) is ValueError and str(error)
    else:
        assert all(type(label) is int and 0 <= label < 10 for label in found)
