"""Whether a resumed run finds the shards that it has read: other bytes are refused, knowing more is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launch import shards as command
from megavit.data.index import index_header, read_index
from megavit.data.lanes import DataState
from megavit.data.loader import TrainLoader
from megavit.data.manifest import Manifest, index_pattern, open_shards, read_manifest, write_index
from tests.data.shards import cache_in, labelled, write_shards
from tests.data.test_index import sample_members, write_tar
from tests.train.runs import DEMO

RUN = DEMO
# What was saved, before checksums had a digest of their own, for the
# shards of `three_shards`, without, with one and with all index files.
BARE = "05339c424dc69ff4c144faeeee957e2c"
ONE_INDEXED = "daeef7f5794c04fe53f74963e6f4d212"
INDEXED = "dfa4955118e9be270fdaf7c7c4601f58"


def three_shards(folder: Path) -> str:
    for i in range(3):
        write_tar(folder / f"g-{i}.tar", sample_members(4 + i))
    return f"{folder}/g-*.tar"


def index(folder: Path, shards: str = "*.tar") -> None:
    for path in folder.glob(shards):
        write_index(path, f"{path}.idx")


def without_content(path: Path) -> None:
    """Make an index or manifest file what it was before checksums had a digest of their own."""
    line, newline, rest = path.read_bytes().partition(b"\n")
    fields = {
        key: value
        for key, value in json.loads(line).items()
        if key not in ("content", "contents", "content_digest")
    }
    path.write_bytes(json.dumps(fields).encode() + newline + rest)


def loader(manifest: Manifest, state: dict | None = None, data_file: Path | None = None) -> TrainLoader:
    return TrainLoader(
        manifest,
        labelled(RUN.model, RUN.data),
        dataclasses.replace(RUN.data, shards="x"),
        seed=0,
        global_batch=4,
        micro_batch=4,
        state=DataState.from_json(json.loads(json.dumps(state))) if state else None,
        data_file=data_file,
    )


def saved_earlier(digest: str) -> dict:
    """A state of a checkpoint as it was before checksums had a digest of their own."""
    return {
        "step": 2,
        "epoch": 0,
        "position": 2,
        "num_lanes": 4,
        "block": RUN.data.shuffle_block,
        "seed": 0,
        "skipped": [],
        "manifest": digest,
        "shards": 3,
        "samples": 15,
    }


def test_index_files_that_appear_change_nothing(tmp_path: Path) -> None:
    """Catches a resumed run that refuses its own shards because they have been indexed meanwhile."""
    pattern = three_shards(tmp_path)
    bare = loader(open_shards(pattern)).state_at(2)
    index(tmp_path, "g-1.tar")
    some = loader(open_shards(pattern), bare).state_at(2)
    index(tmp_path)
    full = loader(open_shards(pattern), some).state_at(2)
    assert bare["manifest"] == some["manifest"] == full["manifest"]
    listed = index_pattern(pattern, tmp_path / "out", 1, cache_in(tmp_path))
    listed.save(tmp_path / "out" / "g.manifest.json")
    for saved in (bare, some, full):
        loader(read_manifest(tmp_path / "out" / "g.manifest.json"), saved)
        loader(open_shards(pattern), saved)
    for path in tmp_path.glob("*.idx"):
        path.unlink()
    for saved in (bare, some, full):
        loader(open_shards(pattern), saved)


def test_what_was_saved_earlier_is_known(tmp_path: Path) -> None:
    """Catches another way to compute a digest, after which no run from earlier can go on."""
    pattern = three_shards(tmp_path)
    loader(open_shards(pattern), saved_earlier(BARE))
    index(tmp_path, "g-0.tar")
    for digest in (BARE, ONE_INDEXED):
        loader(open_shards(pattern), saved_earlier(digest))
    index(tmp_path)
    open_shards(pattern).save(tmp_path / "g.manifest.json")
    for digest in (BARE, INDEXED):
        loader(open_shards(pattern), saved_earlier(digest))
        loader(read_manifest(tmp_path / "g.manifest.json"), saved_earlier(digest))
    with pytest.raises(ValueError, match="changed since step 2"):
        loader(open_shards(pattern), saved_earlier("0" * 32))


def test_files_written_earlier_are_read(tmp_path: Path) -> None:
    """Catches index and manifest files that have to be made again, and states that fit only one kind of
    file."""
    pattern = three_shards(tmp_path)
    index(tmp_path)
    open_shards(pattern).save(tmp_path / "new.manifest.json")
    new = read_manifest(tmp_path / "new.manifest.json")
    for path in tmp_path.glob("*.idx"):
        without_content(path)
        assert index_header(path)["content"] == read_index(path).content_digest
    assert loader(open_shards(pattern)).state_at(2) == loader(new).state_at(2)
    (tmp_path / "old.manifest.json").write_bytes((tmp_path / "new.manifest.json").read_bytes())
    without_content(tmp_path / "old.manifest.json")
    old = read_manifest(tmp_path / "old.manifest.json")
    for saving in (new, old):
        for going_on in (new, old):
            loader(going_on, loader(saving).state_at(2))
    loader(old, saved_earlier(INDEXED))


def test_a_changed_shard_of_the_same_length_is_refused_and_named(tmp_path: Path) -> None:
    """Catches training on other images in the same places, where both sides know the checksums."""
    pattern = three_shards(tmp_path)
    index(tmp_path)
    before = loader(open_shards(pattern))
    before.save_order(tmp_path / "data.json", 0)
    state = before.state_at(2)
    members = sample_members(5)
    members["0002.png"] = members["0002.png"][::-1].replace(b"\2", b"\3")
    write_tar(tmp_path / "g-1.tar", members)
    index(tmp_path, "g-1.tar")
    words = r"changed since step 2: .*first difference at shard 1: g-1\.tar \(5 samples.* is now g-1\.tar"
    with pytest.raises(ValueError, match=words):
        loader(open_shards(pattern), state, tmp_path / "data.json")
    with pytest.raises(ValueError, match="changed since step 2: 3 shards with 15 samples"):
        loader(open_shards(pattern), state)  # the message does without the file
    (tmp_path / "g-1.tar.idx").unlink()
    loader(open_shards(pattern), state)  # nothing that is known differs


def test_a_changed_shard_is_refused_without_checksums(tmp_path: Path) -> None:
    """Catches samples read at the places of other ones."""
    pattern = three_shards(tmp_path)
    before = loader(open_shards(pattern))
    before.save_order(tmp_path / "data.json", 0)
    members = sample_members(5)
    members["0002.png"] += bytes(1)  # the padding takes it: the shard's length stays
    length = (tmp_path / "g-1.tar").stat().st_size
    write_tar(tmp_path / "g-1.tar", members)
    assert (tmp_path / "g-1.tar").stat().st_size == length
    for indexed in (False, True):
        if indexed:
            index(tmp_path)
        with pytest.raises(ValueError, match=r"first difference at shard 1: g-1\.tar"):
            loader(open_shards(pattern), before.state_at(2), tmp_path / "data.json")


def test_the_samples_of_a_step_are_still_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches `which` refusing shards whose index files have appeared, a start that forgets the steps before
    it because of them, and a change of shards that is not named."""
    write_shards(tmp_path, shards=3, samples=40, indexed=False)
    config = dataclasses.replace(RUN.data, shards=f"{tmp_path}/x-*.tar")
    fields = labelled(RUN.model, config)
    sizes = {"seed": 0, "global_batch": 8, "micro_batch": 8}
    path = tmp_path / "run" / "data.json"
    path.parent.mkdir()
    first = TrainLoader(open_shards(config.shards), fields, config, **sizes)
    first.save_order(path, 0)
    state = DataState.from_json(json.loads(path.read_text())["state"])
    which = ["which", "--run_dir", str(path.parent), "--step", "1"]
    assert command.main(which) == 0
    told = capsys.readouterr().out
    index(tmp_path)
    again = TrainLoader(open_shards(config.shards), fields, config, **sizes, state=state)
    again.save_order(path, 5)
    assert command.main(which) == 0 and capsys.readouterr().out == told
    assert len(told.splitlines()) == 8
    write_shards(tmp_path, shards=2, samples=60)
    assert command.main(which) == 1
    assert "first difference at shard 0: x-000.tar (40 samples" in capsys.readouterr().err
