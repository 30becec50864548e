"""Which shards are read: patterns, manifests, their differences, and indexing that goes on after an error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megavit.data.identity import difference
from megavit.data.index import ShardError
from megavit.data.manifest import expand_shards, index_pattern, open_shards, read_manifest
from megavit.data.reader import ShardReader
from tests.data.shards import cache_in, picture, truncate, write_shards


def test_patterns_expand_in_order(digits: Path) -> None:
    """Catches braces and wildcards taken literally, and a shard counted twice."""
    braces = expand_shards(f"{digits}/train-{{000002..000004}}.tar")
    assert [Path(p).name for p in braces] == ["train-000002.tar", "train-000003.tar", "train-000004.tar"]
    assert len(expand_shards(f"{digits}/train-*.tar")) == 15
    assert open_shards(f"{digits}/t*.tar").num_samples == 1797
    urls = expand_shards("https://h/a?b=[1]/x-{0..2}.tar")
    assert urls == [f"https://h/a?b=[1]/x-{i}.tar" for i in range(3)]
    with pytest.raises(ShardError, match=r"train-000002\.tar is named twice"):
        expand_shards(f"{digits}/train-00000{{2,2}}.tar")


@pytest.mark.parametrize("pattern", ["none-*.tar", "train-{000013..000016}.tar"])
def test_missing_shards_of_a_pattern_are_named(digits: Path, pattern: str) -> None:
    """Catches training on whatever happens to be there."""
    with pytest.raises(ShardError, match=r"none-\*|train-000015"):
        expand_shards(f"{digits}/{pattern}")


def test_writers_leave_an_index_and_a_manifest(digits: Path) -> None:
    """Catches shards that have to be walked at every start, and an index without checksums."""
    manifest = open_shards(str(digits / "train.manifest.json"))
    assert manifest.num_samples == 1437 and len(manifest) == 15
    assert all(manifest.index(shard).has_checksums for shard in range(15))
    assert manifest.digest == open_shards(f"{digits}/train-*.tar").digest


def test_a_manifest_moves_with_its_data(tmp_path: Path) -> None:
    """Catches absolute paths in the file, or in the digest that a checkpoint keeps."""
    before = write_shards(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = read_manifest(tmp_path / "b" / "x.manifest.json")
    assert after.digest == before.digest and not difference(after.rows(), before.rows())
    assert after.index(2).key(0) == "000080"


def test_shards_without_index_are_walked_in_memory(tmp_path: Path) -> None:
    """Catches an index file that is required."""
    manifest = write_shards(tmp_path, shards=2, indexed=False)
    assert manifest.num_samples == 80 and manifest.index(1).key(0) == "000040"
    with pytest.raises(ValueError, match="index them first"):
        manifest.save(tmp_path / "x.manifest.json")


@pytest.mark.parametrize(
    ("shards", "samples", "words"),
    [
        (6, 40, ""),
        (7, 40, "x-006.tar (40 samples"),
        (5, 40, "is gone"),
        (6, 41, "first difference at shard 0: x-000.tar (40 samples"),
    ],
)
def test_differences_are_named(tmp_path: Path, shards: int, samples: int, words: str) -> None:
    """Catches a refusal that does not say what changed."""
    before = write_shards(tmp_path / "a")
    after = write_shards(tmp_path / "b", shards=shards, samples=samples)
    found = difference(after.rows(), before.rows())
    assert words in found and bool(found) == bool(words)


def test_indexing_names_every_bad_shard_and_keeps_the_good_ones(tmp_path: Path) -> None:
    """Catches a run over 400,000 shards that ends at the first bad one, and does all again after the
    repair."""
    write_shards(tmp_path, shards=4, indexed=False)
    good = (tmp_path / "x-001.tar").read_bytes()
    for name in ("x-001.tar", "x-003.tar"):
        truncate(tmp_path / name, 30_000)
    with pytest.raises(ShardError, match=r"(?s)2 of 4 shards.*x-001\.tar.*x-003\.tar"):
        index_pattern(f"{tmp_path}/x-*.tar", tmp_path / "out", 2, cache_in(tmp_path))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.idx")}
    assert len(kept) == 2
    for name in ("x-001.tar", "x-003.tar"):
        (tmp_path / name).write_bytes(good)
    manifest = index_pattern(f"{tmp_path}/x-*.tar", tmp_path / "out", 1, cache_in(tmp_path))
    assert len(manifest) == 4 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    os.utime(tmp_path / "x-000.tar", (2e9, 2e9))  # a shard newer than its index
    index_pattern(f"{tmp_path}/x-*.tar", tmp_path / "out", 1, cache_in(tmp_path))
    assert sum(path.stat().st_mtime_ns != time for path, time in kept.items()) == 1


def test_shards_of_one_name_keep_their_own_indexes(tmp_path: Path) -> None:
    """Catches a/x.tar and b/x.tar sharing one index file."""
    write_shards(tmp_path / "a", shards=1, indexed=False)
    write_shards(tmp_path / "b", shards=1, samples=7, indexed=False)
    manifest = index_pattern(f"{tmp_path}/{{a,b}}/x-000.tar", tmp_path / "out", 1, cache_in(tmp_path))
    assert manifest.samples.tolist() == [40, 7] and len(set(manifest.indexes)) == 2
    assert [len(manifest.index(shard)) for shard in (0, 1)] == [40, 7]


@pytest.mark.parametrize("change", ["samples", "not json", "format", "missing", "empty"])
def test_unusable_manifests_are_named(tmp_path: Path, change: str) -> None:
    """Catches an edited or cut-off manifest taken for good."""
    write_shards(tmp_path)
    path = tmp_path / "x.manifest.json"
    columns = json.loads(path.read_text())
    if change == "samples":
        columns["samples"][2] += 1
    if change == "format":
        columns["format"] = "megavit-manifest-0"
    path.write_text(path.read_text()[:50] if change == "not json" else json.dumps(columns))
    if change == "empty":
        path.write_text("")
    if change == "missing":
        path.unlink()
    with pytest.raises(ShardError, match=r"x\.manifest\.json"):
        open_shards(str(path))


def test_commands_of_a_manifest_need_permission(tmp_path: Path) -> None:
    """Catches a data file that runs programs on every machine that reads it."""
    made = write_shards(tmp_path, shards=2)
    ran = tmp_path / "ran"
    command = f"pipe:touch {ran}; cat {tmp_path}/x-001.tar"
    path = tmp_path / "commands.manifest.json"
    dataclasses.replace(made, urls=(made.urls[0], command)).save(path)
    words = rf"manifest {path}: shard 1 is the shell command '{command}'.*--data\.allow_pipe .*--allow_pipe"
    with pytest.raises(ShardError, match=words):
        open_shards(str(path), cache_in(tmp_path))
    assert not ran.exists()
    reader = ShardReader(open_shards(str(path), cache_in(tmp_path), allow_pipe=True), cache_in(tmp_path))
    reader.fetch({0, 1})
    assert ran.exists() and reader.read(1, 0, [reader.members(1, 0)["png"]]) == [picture(40)]
    # What is typed is meant.
    assert open_shards(f"pipe:cat {tmp_path}/x-001.tar", cache_in(tmp_path)).num_samples == 40
    pattern = f"pipe:cat {tmp_path}/x-{{000..001}}.tar"
    assert index_pattern(pattern, tmp_path / "out", 1, cache_in(tmp_path)).num_samples == 80


def test_an_exchanged_index_is_noticed(tmp_path: Path) -> None:
    """Catches another shard's offsets used in silence."""
    manifest = write_shards(tmp_path / "a")
    other = write_shards(tmp_path / "b", samples=30)
    shutil.copy(other.indexes[0], manifest.indexes[0])
    with pytest.raises(ShardError, match="30 samples, the manifest 40"):
        manifest.index(0)
    assert np.array_equal(manifest.samples, [40] * 6)
