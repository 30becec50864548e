"""A table of mistakes with shards and data: each ends in one line that names the file, never in a traceback.

A row makes the input in an empty folder and runs into the mistake. `{tmp}` in the expected words is that
folder.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from launch import shards as command
from megavit.data.bad import SampleError
from megavit.data.cache import ShardCache
from megavit.data.fields import Field, Number, Plane
from megavit.data.images import DecodeError
from megavit.data.index import ShardError, index_shard, read_index
from megavit.data.loader import EvalLoader
from megavit.data.manifest import open_shards, read_manifest
from megavit.data.sources import SourceError
from tests.data.shards import labelled, picture, truncate, write_shards
from tests.data.tars import END, alarm, header, member, pax, record, sample
from tests.train.runs import DEMO

OWN_ERRORS = (ShardError, SourceError, SampleError, DecodeError, ValueError)
RUN = DEMO
Way = Callable[[Path], object]


def reports(way: Way, folder: Path) -> str:
    """The message of the error that `way` ends with; it must be an error of ours, in one line."""
    with alarm(), pytest.raises(OWN_ERRORS) as caught:
        way(folder)
    assert type(caught.value) in OWN_ERRORS, f"{type(caught.value)} leaks out: {caught.value}"
    return one_line(str(caught.value))


def one_line(message: str) -> str:
    assert message.strip() and "\n" not in message and "Traceback" not in message
    assert len(message) < 700, "nobody reads that"
    return message


def check(folder: Path, message: str, words: str) -> None:
    assert re.search(words.replace("{tmp}", re.escape(str(folder))), message), message


# ---- tar files and index files


def tar(*parts: bytes) -> Way:
    def way(folder: Path) -> object:
        (folder / "odd.tar").write_bytes(b"".join(parts))
        return open_shards(f"{folder}/odd.tar")

    return way


def changed_index(change: Callable[[bytes], bytes]) -> Way:
    def way(folder: Path) -> object:
        write_shards(folder, shards=1, samples=3)
        path = folder / "x-000.tar.idx"
        path.write_bytes(change(path.read_bytes()))
        return read_index(path)

    return way


def header_with(**fields: object) -> Way:
    """An index file whose first line says something else."""

    def change(data: bytes) -> bytes:
        line, newline, rest = data.partition(b"\n")
        return json.dumps(json.loads(line) | fields).encode() + newline + rest

    return changed_index(change)


GOOD = sample("a") + sample("b")
TARS: dict[str, tuple[Way, str]] = {
    "empty file": (
        tar(),
        r"{tmp}/odd\.tar is truncated: it ends at byte 0, without",
    ),
    "no samples": (tar(END), r"{tmp}/odd\.tar holds no samples"),
    "login page": (
        tar(b"<html>" + b"log in " * 99),
        r"odd\.tar is damaged.*at byte 0, where it begins with b'<ht",
    ),
    "gzip": (tar(gzip.compress(GOOD + END)), r"odd\.tar is compressed \(gzip\).*unpack it"),
    "cut off between members": (tar(GOOD), r"odd\.tar is truncated: it ends at byte 4096, without a tar"),
    "cut off inside a header": (
        tar(GOOD, GOOD[:100]),
        r"odd\.tar is truncated: it ends at byte 4196, without",
    ),
    "cut off inside a member": (
        tar(GOOD, header("c.png", 900), bytes(600)),
        r"odd\.tar is truncated: 'c\.png' \(header at byte 4096\) ends past its 5208 bytes",
    ),
    "overwritten header": (tar(sample(), bytes(512), sample("b")), r"odd\.tar is damaged: zeros instead"),
    "the same name twice": (tar(sample(), member("a.png", b""), END), r"odd\.tar: 'a\.png' appears twice"),
    "key with dots": (
        tar(*(member(f"img.{i:05}.png", b"") for i in range(400)), END),
        r"odd\.tar: 400 different extensions \('00000\.png', .*first dot of its name",
    ),
    "sparse file": (
        tar(pax(record("GNU.sparse.major", "1")), sample(), END),
        r"odd\.tar.*sparse file.*--sparse",
    ),
    "negative size": (
        tar(header("a.png", -512), END),
        r"odd\.tar is damaged: a size of -512 bytes in the header",
    ),
    "PAX size in words": (
        tar(pax(record("size", "big")), sample(), END),
        r"odd\.tar.*the size 'big'.*at byte 1024",
    ),
    "endless PAX header": (
        tar(pax(b"0 a=b\n"), sample(), END),
        r"odd\.tar is damaged: bad PAX header at byte 512",
    ),
    "not a file": (
        lambda folder: index_shard(folder),
        "shard {tmp} cannot be read: it is not a regular file",
    ),
    "missing": (lambda folder: index_shard(folder / "no.tar"), r"{tmp}/no\.tar cannot be read: No such file"),
    "index: empty": (changed_index(lambda data: b""), r"index {tmp}/x-000\.tar\.idx cannot be read"),
    "index: cut off": (
        changed_index(lambda data: data[:-9]),
        r"x-000\.tar\.idx is damaged.*make it again with",
    ),
    "index: another file": (
        changed_index(lambda data: b"\x89PNG" * 99),
        r"x-000\.tar\.idx is not an index.*not UTF-8",
    ),
    "index: deep nesting": (
        changed_index(lambda data: b"[" * 4000),
        r"x-000\.tar\.idx is not an.*nested too deeply",
    ),
    "index: null": (
        changed_index(lambda data: b"null\n" + data),
        r"x-000\.tar\.idx.*holds null, not an object",
    ),
    "index: no format": (changed_index(lambda data: b"{}\n" + data), r"x-000\.tar\.idx.*no field 'format'"),
    "index: another version": (
        header_with(format="megavit-index-9"),
        r"x-000\.tar\.idx.*'megavit-index-9'.*again",
    ),
    "index: count in words": (
        header_with(samples="3"),
        r"x-000\.tar\.idx.*'samples' is a string \('3'\), not a wh",
    ),
    "index: content null": (header_with(content=None), r"x-000\.tar\.idx.*'content' is null, not a string"),
    "index: negative count": (header_with(samples=-3), r"x-000\.tar\.idx is not an index.*counts are .*-3"),
    "index: count too large": (
        header_with(samples=10**6),
        r"x-000\.tar\.idx is cut off: it states 1000000 samples",
    ),
    "index: shard too short": (
        header_with(shard_bytes=600),
        r"x-000\.tar\.idx is damaged.*outside the shard",
    ),
    "index: extensions": (header_with(extensions=[1]), r"x-000\.tar\.idx.*its extensions are no strings"),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_and_indexes(tmp_path: Path, name: str) -> None:
    """Catches a damaged file taken for good, a hang, and an error that names neither file nor place."""
    way, words = TARS[name]
    check(tmp_path, reports(way, tmp_path), words)


# ---- manifests and patterns


def manifest(text: bytes | None = None, **fields: object) -> Way:
    """A manifest file with other fields (None takes one away), or with another content altogether."""

    def way(folder: Path) -> object:
        write_shards(folder, shards=2, samples=3)
        path = folder / "x.manifest.json"
        if text is None:
            columns = json.loads(path.read_text()) | fields
            path.write_text(json.dumps({key: value for key, value in columns.items() if value is not None}))
        else:
            path.write_bytes(text)
        return read_manifest(path)

    return way


def pattern(text: str) -> Way:
    def way(folder: Path) -> object:
        write_shards(folder, shards=2, samples=3, indexed=False)
        os.mkfifo(folder / "pipe.tar")
        (folder / "link.tar").symlink_to(folder / "nowhere.tar")
        cache = ShardCache(folder / "cache", 10**9, attempts=1)
        return open_shards(text.replace("{tmp}", str(folder)), cache)

    return way


X = r"manifest {tmp}/x\.manifest\.json "
MANIFESTS: dict[str, tuple[Way, str]] = {
    "missing": (
        lambda folder: open_shards(f"{folder}/x.manifest.json"),
        X + "does not exist; write it with launch",
    ),
    "a folder": (lambda folder: read_manifest(folder), "manifest {tmp} cannot be read: Is a directory"),
    "empty": (manifest(b""), X + "cannot be used: it is not JSON"),
    "cut off": (
        manifest(b'{"format": "megavit-manifest-1", "urls": ["a'),
        X + "cannot be used: it is not JSON",
    ),
    "not UTF-8": (manifest(b'{"format": "\xff\xfe"}'), X + r".*it is not UTF-8 text \(byte 12\)"),
    "deep nesting": (manifest(b"[" * 100_000), X + ".*it is nested too deeply"),
    "deep nesting inside": (manifest(b'{"format":' * 50_000), X + ".*it is nested too deeply"),
    "null": (manifest(b"null"), X + ".*it holds null, not an object"),
    "a list": (manifest(b"[1, 2]"), X + ".*it holds a list, not an object"),
    "huge number": (manifest(b"1" * 5000), X + ".*it is not JSON"),
    "no format": (manifest(format=None), X + ".*it has no field 'format'"),
    "another version": (manifest(format="megavit-manifest-9"), X + ".*its format is 'megavit-manifest-9'"),
    "no urls": (manifest(urls=None), X + ".*it has no field 'urls'"),
    "urls null": (manifest(urls=[None, "x"]), X + ".*entry 0 of its 'urls' is null, not a path or name"),
    "urls with a zero byte": (manifest(urls=["x", "a\0b"]), X + ".*entry 1 of its 'urls'"),
    "one url": (manifest(urls="x-000.tar"), X + r".*'urls' is a string \('x-000\.tar'\), not a list"),
    "samples in words": (manifest(samples=["3", 3]), X + r".*entry 0 of its 'samples' is a string \('3'\)"),
    "negative samples": (
        manifest(samples=[3, -3]),
        X + r".*entry 1 of its 'samples' is a whole number \(-3\)",
    ),
    "samples with a fraction": (manifest(samples=[3, 2.5]), X + r".*a number with a fraction \(2\.5\)"),
    "endless samples": (manifest(samples=[3, 10**30]), X + ".*entry 1 of its 'samples'"),
    "samples true": (manifest(samples=[3, True]), X + r".*is true or false \(True\), not a count"),
    "fewer samples": (manifest(samples=[3]), X + ".*columns are of different lengths"),
    "edited": (manifest(samples=[3, 4]), X + ".*its digest differs from its content; write it again"),
    "edited contents": (manifest(contents=["0", "1"]), X + ".*its digest differs from its content"),
    "digest a number": (manifest(digest=5), X + r".*'digest' is a whole number \(5\), not a string"),
    "missing index": (
        lambda folder: (
            manifest()(folder),
            (folder / "x-001.tar.idx").unlink(),
            read_manifest(folder / "x.manifest.json").index(1),
        ),
        r"index {tmp}/x-001\.tar\.idx cannot be read: No such file",
    ),
    "pattern: nothing there": (
        pattern("{tmp}/none-*.tar"),
        r"shard {tmp}/none-\*\.tar does not exist.*launch/shards",
    ),
    "pattern: one missing": (pattern("{tmp}/x-{000..002}.tar"), r"shard {tmp}/x-002\.tar does not exist"),
    "pattern: named twice": (pattern("{tmp}/x-{000,000}.tar"), r"{tmp}/x-000\.tar is named twice"),
    "pattern: open brace": (pattern("{tmp}/x-{000..001.tar"), r"x-\{000\.\.001\.tar"),
    "pattern: a folder": (pattern("{tmp}"), "shard {tmp} is not a regular file"),
    "pattern: a device": (pattern("/dev/zero"), "shard /dev/zero is not a regular file"),
    "pattern: a named pipe": (pattern("{tmp}/pipe.tar"), r"{tmp}/pipe\.tar is not a regular file"),
    "pattern: a dangling link": (pattern("{tmp}/link.tar"), r"shard {tmp}/link\.tar does not exist"),
    "pattern: met by a wildcard": (
        pattern("{tmp}/*.tar"),
        r"{tmp}/(pipe|link)\.tar (is not a regular|does not exist)",
    ),
    "pattern: empty": (pattern(""), "no shards are named: the pattern is empty"),
    "pattern: unknown scheme": (pattern("s4://bucket/x.tar"), "s4://bucket/x.tar: unknown scheme 's4'"),
    "pattern: failing command": (pattern("pipe:echo no >&2; exit 3"), "pipe:echo no.*exit status 3: no"),
    "pattern: command gives no tar": (
        pattern("pipe:echo hello"),
        "pipe:echo hello is damaged.*it was fetched as {tmp}/cache/",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_and_patterns(tmp_path: Path, name: str) -> None:
    """Catches KeyError, TypeError and RecursionError from a file that is no manifest, and a pattern that
    reads what it should not."""
    way, words = MANIFESTS[name]
    check(tmp_path, reports(way, tmp_path), words)


# ---- labels and images: bad samples, with a reason

BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "no label": ({"png": picture(0)}, "it has png but no cls or json"),
    "no image": ({"cls": b"1", "txt": b"a cat"}, "it has cls, txt but no jpg or jpeg or png or webp"),
    "label in words": ({"png": picture(0), "cls": b"cat"}, "label 'cat' is not a class number"),
    "label too large": (
        {"png": picture(0), "cls": b"10"},
        r"label 10 is outside 0\.\.9; set --model\.num_classes",
    ),
    "endless label": ({"png": picture(0), "cls": b"9" * 9999}, "label '9999.*' is not a class number"),
    "label not UTF-8": ({"png": picture(0), "cls": b"\xff"}, "is not a class number"),
    "json: deep nesting": (
        {"png": picture(0), "json": b"[" * 200_000},
        "json label .*: it is nested too deeply",
    ),
    "json: null": ({"png": picture(0), "json": b"null"}, "json label 'null' is neither a list"),
    "json: cut off": (
        {"png": picture(0), "json": b'{"labels": [1'},
        "json label cannot be parsed: it is not JSON",
    ),
    "json: other names": ({"png": picture(0), "json": b'{"label": 1}'}, r"neither a list.*nor \{\"labels\""),
    "json: many labels": (
        {"png": picture(0), "json": b"[0,1,2,3,4]"},
        r"5 labels, more than --data\.max_labels 4",
    ),
    "image: empty": (
        {"png": b"", "cls": b"1"},
        r"cannot be decoded: not an image of a known format \(JPEG, ",
    ),
    "image: login page": (
        {"jpg": b"<html>" * 9, "cls": b"1"},
        "cannot be decoded: not an image of a known format",
    ),
    "image: cut off": ({"png": picture(1)[:60], "cls": b"1"}, "it cannot be decoded: "),
    "image: another format": ({"jpg": picture(1, "GIF"), "cls": b"1"}, "not an image of a known format"),
    "image: too large": (
        {"png": picture(1, size=(99, 99)), "cls": b"1"},
        r"99x99 pixels .* --data\.max_pixels 9000",
    ),
    "image: JPEG too large": (
        {"jpg": picture(1, "JPEG", (99, 99)), "cls": b"1"},
        r"99x99 .*--data\.max_pixels 9000",
    ),
    "image: JPEG cut off": ({"jpg": picture(1, "JPEG")[:90], "cls": b"1"}, "cannot be decoded: JPEG"),
}


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


SAMPLE = {"png": picture(0), "cls": b"1"}
DEPTH = Plane("depth", ("depth.png", "depth.npy"), size=8)
MASK = Plane("mask", ("mask.png", "mask.npy"), size=8, dtype="uint8", fill=255)
AGE = Number("age", "age")
BAD_FIELDS: dict[str, tuple[Field, dict[str, bytes], str]] = {
    "plane: missing": (DEPTH, {}, "it has cls, png but no depth.png or depth.npy"),
    "plane: another size": (
        DEPTH,
        {"depth.png": picture(0, size=(9, 8))},
        "its depth.png has 9x8 pixels, but its picture 8x8",
    ),
    "plane: JPEG": (DEPTH, {"depth.png": picture(0, "JPEG")}, "its depth.png cannot .*JPEG, not PNG"),
    "plane: cut off": (DEPTH, {"depth.png": picture(0)[:60]}, "its depth.png cannot be decoded: "),
    "plane: no npy": (DEPTH, {"depth.npy": b"0"}, "its depth.npy cannot be decoded: its npy header cannot"),
    "plane: npy cut off": (
        DEPTH,
        {"depth.npy": npy(np.ones((8, 8)))[:-1]},
        r"511 bytes of values for shape \[8, 8\]",
    ),
    "plane: npy of objects": (
        DEPTH,
        {"depth.npy": npy(np.full((8, 8), None, object))},
        "its npy holds object, not numbers",
    ),
    "plane: one row": (DEPTH, {"depth.npy": npy(np.ones(64))}, r"its npy has shape \[64\], not \[H, W\] or"),
    "plane: colours": (
        DEPTH,
        {"depth.npy": npy(np.ones((8, 8, 3)))},
        "its depth.npy has 3 channels, not 1",
    ),
    "plane: class too large": (
        MASK,
        {"mask.npy": npy(np.full((8, 8), 256))},
        "its mask.npy holds 256, which is",
    ),
    "plane: fraction of a class": (
        MASK,
        {"mask.npy": npy(np.full((8, 8), 1.5))},
        "holds 1.5, which is no uint8",
    ),
    "number: no JSON": (AGE, {"json": b"{"}, "its json cannot be parsed: it is not JSON"),
    "number: a list": (AGE, {"json": b"[1]"}, "its json holds a list, not an object with 'age'"),
    "number: missing": (AGE, {"json": b"{}"}, "its json has no 'age'"),
    "number: a string": (AGE, {"json": b'{"age": "1"}'}, r"has a string \('1'\) as 'age', not a number"),
    "number: true": (AGE, {"json": b'{"age": true}'}, "has true or false .*as 'age', not a number"),
    "number: NaN": (AGE, {"json": b'{"age": NaN}'}, "has nan as 'age', no finite float32"),
    "number: endless": (AGE, {"json": b'{"age": 1%s}' % (b"0" * 99)}, "has 1000.* as 'age', no finite"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_planes_and_numbers(tmp_path: Path, name: str) -> None:
    """Catches a plane of another picture that trains in silence, and a field's mistake without its member."""
    field, members, words = BAD_FIELDS[name]
    check_bad(tmp_path, SAMPLE | members, words, field)


@pytest.mark.parametrize("name", BAD)
def test_labels_and_images(tmp_path: Path, name: str) -> None:
    """Catches a run that one sample ends, and a record that does not say which one and why."""
    check_bad(tmp_path, *BAD[name])


def check_bad(tmp_path: Path, members: dict[str, bytes], words: str, *more: Field) -> None:
    with wds.TarWriter(str(tmp_path / "x.tar"), encoder=False, mtime=0) as writer:
        writer.write({"__key__": "odd", **members})
    config = dataclasses.replace(RUN.data, max_pixels=9000, max_labels=4)
    fields = [*labelled(RUN.model, config), *more]
    with alarm():
        (batch,) = EvalLoader(open_shards(f"{tmp_path}/x.tar"), fields, config, batch=1)
    (bad,) = batch.bad
    check(tmp_path, one_line(str(SampleError(bad))), rf"{{tmp}}/x\.tar: sample 'odd': .*{words}")


# ---- launch/shards.py


def nothing(folder: Path) -> None:
    pass


def shards(folder: Path) -> None:
    write_shards(folder / "data", shards=2, samples=3)


def cifar(**fields: object) -> Callable[[Path], None]:
    """CIFAR-10 whose first file holds other fields, or, with `raw`, other bytes."""

    def make(folder: Path) -> None:
        root = folder / "cifar-10-batches-py"
        root.mkdir()
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]} | fields
        raw = batch.pop("raw", None)
        content = {key.encode(): value for key, value in batch.items() if value is not None}
        (root / "data_batch_1").write_bytes(raw or pickle.dumps(content))

    return make


def images(folder: Path) -> None:
    for name in ("train/cat/a.png", "val/dog/b.png"):
        (folder / "images" / name).parent.mkdir(parents=True)
        (folder / "images" / name).write_bytes(picture(0))


def images_beside_a_file(folder: Path) -> None:
    (folder / "images" / "cat").mkdir(parents=True)
    (folder / "images" / "cat" / "a.png").write_bytes(picture(0))
    (folder / "file").write_text("")


def data_file(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "data.json").write_text(text)

    return make


def other_record(folder: Path) -> None:
    images_beside_a_file(folder)
    (folder / "out").mkdir()
    (folder / "out" / "train.json").write_text("[" * 100_000)


def missing_first_index(folder: Path) -> None:
    shards(folder)
    (folder / "data" / "x-000.tar.idx").unlink()


def commands(folder: Path) -> None:
    made = write_shards(folder / "data", shards=1, samples=3)
    dataclasses.replace(made, urls=("pipe:touch ran",)).save(folder / "data" / "x.manifest.json")


def cut_off_shard(folder: Path) -> None:
    write_shards(folder / "data", shards=1, samples=3, indexed=False)
    truncate(folder / "data" / "x-000.tar", 600)


IMAGES, OUT, DATA = "imagefolder --root {tmp}/images", "--out {tmp}/out", "{tmp}/data/x.manifest.json"
STATE = dict.fromkeys(("step", "epoch", "position", "num_lanes", "block", "seed", "shards", "samples"), 1)
STATE |= {"skipped": [], "manifest": "0"}
C10 = "cifar10 --root {tmp} --out {tmp}/out"
COMMANDS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "imagefolder: wrong root": (nothing, f"{IMAGES} {OUT}", "--root {tmp}/images is not a folder"),
    "imagefolder: empty folder": (
        lambda folder: (folder / "images").mkdir(),
        f"{IMAGES} {OUT}",
        "{tmp}/images holds no images .*jpg",
    ),
    "imagefolder: other classes": (images, f"{IMAGES} {OUT}", "{tmp}/images/val has classes .* lacks: dog"),
    "imagefolder: out is a file": (
        images_beside_a_file,
        f"{IMAGES} --out {{tmp}}/file",
        "--out {tmp}/file cannot be made",
    ),
    "imagefolder: broken record": (
        other_record,
        f"{IMAGES} {OUT}",
        r"{tmp}/out/train\.json cannot be read: it is nested",
    ),
    "zero shard_size": (
        images_beside_a_file,
        f"{IMAGES} {OUT} --shard_size 0",
        "--shard_size 0 and --workers .* at least 1",
    ),
    "no workers": (images_beside_a_file, f"{IMAGES} {OUT} --workers 0", "--workers 0 must be at least 1"),
    "digits: holdout": (
        nothing,
        f"digits {OUT} --holdout 5000",
        r"--holdout must lie in 1\.\.1436, got 5000",
    ),
    "cifar: missing file": (nothing, C10, "{tmp}/data_batch_1 is missing; --root must hold"),
    "cifar: second file missing": (cifar(), C10, "{tmp}/cifar-10-batches-py/data_batch_2 is missing"),
    "cifar: not a pickle": (
        cifar(raw=b"\x80\x04no pickle"),
        C10,
        "{tmp}/.*data_batch_1 is not a CIFAR file",
    ),
    "cifar: code": (
        cifar(raw=b"cos\nsystem\n(S'true'\ntR."),
        C10,
        "data_batch_1 is not .*arrays only, not os.system",
    ),
    "cifar: cut off": (
        cifar(raw=pickle.dumps({b"data": np.zeros(9999)})[:-2000]),
        C10,
        "data_batch_1 is not a CIFAR file",
    ),
    "cifar: no labels": (cifar(labels=None), C10, "data_batch_1 is not a CIFAR file with data and labels"),
    "cifar: labels a number": (
        cifar(labels=5),
        C10,
        r"data_batch_1: data of shape \(2, 3072\) with labels of shape \(\)",
    ),
    "cifar: label in words": (cifar(labels=["cat", "dog"]), C10, "data_batch_1 is not a CIFAR file"),
    "cifar: label outside": (
        cifar(labels=[1, 10]),
        C10,
        "data_batch_1: labels 1 to 10 are not those of CIFAR-10",
    ),
    "cifar: other images": (
        cifar(data=np.zeros((2, 5), np.uint8)),
        C10,
        r"data_batch_1: data of shape \(2, 5\)",
    ),
    "index: nothing there": (nothing, f"index {{tmp}}/*.tar {OUT}", r"{tmp}/\*\.tar does not exist"),
    "index: a manifest": (shards, f"index {DATA} {OUT}", r"x\.manifest\.json is a manifest already"),
    "index: a device": (nothing, f"index /dev/zero {OUT}", "/dev/zero is not a regular file"),
    "index: name with folders": (
        shards,
        f"index {{tmp}}/data/*.tar {OUT} --name a/b",
        "--name a/b must be a name without",
    ),
    "index: out is a file": (
        lambda folder: (shards(folder), (folder / "out").write_text("")),
        f"index {{tmp}}/data/*.tar {OUT}",
        "folder {tmp}/out for the indexes cannot be made",
    ),
    "index: no workers": (
        shards,
        f"index {{tmp}}/data/*.tar {OUT} --workers -1",
        "--workers -1 must be at least 1",
    ),
    "index: no cache": (
        shards,
        f"index {{tmp}}/data/*.tar {OUT} --cache_gb 0",
        r"--cache_gb 0\.0 must be a positive number",
    ),
    "verify: no manifest": (
        nothing,
        f"verify {DATA}",
        r"manifest {tmp}/data/x\.manifest\.json does not exist",
    ),
    "verify: cache of no size": (
        shards,
        f"verify {DATA} --cache_gb nan",
        "--cache_gb nan must be a positive number",
    ),
    "verify: cut off": (
        cut_off_shard,
        "verify {tmp}/data/x-000.tar",
        r"{tmp}/data/x-000\.tar is truncated: it ends at byte 600",
    ),
    "verify: commands": (
        commands,
        f"verify {DATA}",
        r"x\.manifest\.json: shard 0 is the shell command.*--allow_pipe",
    ),
    "stats: commands": (
        commands,
        f"stats {DATA}",
        r"x\.manifest\.json: shard 0 is the shell command.*--allow_pipe",
    ),
    "stats: negative": (shards, f"stats {DATA} --shards -1", "--shards -1 cannot be negative"),
    "which: no run": (
        nothing,
        "which --run_dir {tmp} --step 1",
        r"{tmp} is no run folder with data: {tmp}/data\.json: No such",
    ),
    "which: step 0": (nothing, "which --run_dir {tmp} --step 0", "--step counts from 1, got 0"),
    "which: not JSON": (
        data_file("{"),
        "which --run_dir {tmp} --step 1",
        r"{tmp}/data\.json does not tell .*not JSON",
    ),
    "which: deep nesting": (
        data_file("[" * 99_999),
        "which --run_dir {tmp} --step 1",
        r"{tmp}/data\.json .*nested too",
    ),
    "which: no shards": (
        data_file("{}"),
        "which --run_dir {tmp} --step 1",
        r"{tmp}/data\.json .*no field 'shards'",
    ),
    "which: no state": (
        data_file('{"shards": "x", "global_batch": 8, "skips": [], "state": {"manifest": "0"}}'),
        "which --run_dir {tmp} --step 1",
        r"{tmp}/data\.json does not tell the order of a run: it has no field 'step'",
    ),
    "which: odd skips": (
        data_file(json.dumps({"shards": "x", "global_batch": 8, "state": STATE, "skips": [[3]]})),
        "which --run_dir {tmp} --step 1",
        r"{tmp}/data\.json .*: a range of steps is a list, not a list of two numbers",
    ),
    "which: no shards there": (
        data_file(json.dumps({"shards": "none/x.tar", "global_batch": 8, "state": STATE, "skips": []})),
        "which --run_dir {tmp} --step 1",
        r"shard none/x\.tar does not exist",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Catches a traceback, exit status 0, or a message that does not name the flag or the file."""
    make, words, expected = COMMANDS[name]
    make(tmp_path)
    argv = [word.replace("{tmp}", str(tmp_path)) for word in words.split()]
    if argv[0] in ("index", "verify", "stats"):
        argv += ["--cache_dir", str(tmp_path / "cache")]
    with alarm():
        assert command.main(argv) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "shard/s" not in line]
    (message,) = [line for line in lines if line.startswith("error: ")]
    check(tmp_path, one_line(message), expected)


def test_verify_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a missing index of the first shard that ends `verify` before its summary."""
    missing_first_index(tmp_path)
    argv = [
        "verify",
        str(tmp_path / "data" / "x.manifest.json"),
        "--workers",
        "1",
        "--cache_dir",
        str(tmp_path),
    ]
    assert command.main(argv) == 1
    out = capsys.readouterr().out
    assert "x-000.tar.idx cannot be read: No such file" in out and "2 shards, 6 samples: 1 problems" in out


def test_stats_count_what_training_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `stats` that ends, or takes gigabytes, at an image or a label that training would count as
    bad."""
    (tmp_path / "data").mkdir()
    with wds.TarWriter(str(tmp_path / "data" / "x.tar"), encoder=False, mtime=0) as writer:
        for number, (members, _) in enumerate(BAD.values()):
            writer.write({"__key__": f"{number:04}", **members})
        writer.write({"__key__": "good", "png": picture(0), "json": b"[3, 5]"})
    argv = [
        "stats",
        str(tmp_path / "data" / "x.tar"),
        "--workers",
        "1",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    with alarm():
        assert command.main(argv) == 0
    out = capsys.readouterr().out
    # Too large for the limits of the test above only, or for its number of classes.
    usable = {
        "label too large",
        "json: many labels",
        "image: too large",
        "image: JPEG too large",
        "image: cut off",
        "image: JPEG cut off",
    }
    unusable = int(re.search(r"unusable +(\d+)", out)[1])
    assert (
        len(BAD) - len(usable) <= unusable <= len(BAD) - len(usable) + 2
    )  # a cut-off image may have a header
    assert "nested too deeply" in out and "not an image of a known format" in out
