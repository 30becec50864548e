"""The checkpoint format: what counts, what is damaged, and how any layout reads it; no ranks needed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from megavit.parallel.layout import Layout
from megavit.parallel.mesh import Mesh
from megavit.train.checkpoint import folder as checkpoint
from megavit.train.checkpoint.checkpoint import Checkpoint
from megavit.train.checkpoint.manifest import CheckpointError, RankFile
from megavit.train.checkpoint.saver import open_latest
from megavit.train.checkpoint.tensorfile import Entry, write_tensors
from megavit.train.config import RunConfig, plain_config
from tests.data.shards import flip_bit, truncate
from tests.train.saving import RUN as MODEL_RUN
from tests.train.saving import fields_of, save_steps, saver_of

LAYOUTS = {
    "plain": Layout((6, 4)),
    "vector": Layout((5,)),
    "column": Layout((8, 5), 0),
    "qkv": Layout((24, 3), 0, (8, 8, 8)),
    "row": Layout((5, 8), 1),
    "head": Layout((7, 3), 0),  # padded when sharded
}
KINDS = ("weight", "exp_avg")
RUN = plain_config(RunConfig())


def logical(name: str, kind: str) -> np.ndarray:
    shape = LAYOUTS[name].shape
    start = 1000 * list(LAYOUTS).index(name) + 100_000 * KINDS.index(kind)
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def shard(name: str, kind: str, tp_rank: int, tp_size: int) -> np.ndarray:
    import torch

    return LAYOUTS[name].take(torch.from_numpy(logical(name, kind)), tp_rank, tp_size).numpy().reshape(-1)


def save(run_dir: Path, step: int, tp_size: int = 2, dp_size: int = 3) -> Checkpoint:
    """What the ranks of a (tp, dp) run at ZeRO-3 write, committed."""
    folder = checkpoint.checkpoints_of(run_dir)
    partial = checkpoint.partial_folder(folder, step)
    partial.mkdir(parents=True)
    files = []
    for dp_rank, tp_rank in itertools.product(range(dp_size), range(tp_size)):
        slices = {}
        for name, layout in LAYOUTS.items():
            size = int(np.prod(layout.local_shape(tp_size)))
            share = -(-size // dp_size)
            start, stop = min(dp_rank * share, size), min(dp_rank * share + share, size)
            if start < stop and (layout.dim is not None or tp_rank == 0):
                slices[name] = (start, stop)
        parts = {
            f"{kind}/{name}": shard(name, kind, tp_rank, tp_size)[start:stop]
            for kind in KINDS
            for name, (start, stop) in slices.items()
        }
        name = f"rank_{len(files):05d}.safetensors"
        entries = {key: Entry("F32", part.shape) for key, part in parts.items()}
        written = write_tensors(partial / name, entries, parts.values(), {"step": str(step)})
        files.append(RankFile(name, *written, tp_rank, slices))
    described = Checkpoint(
        folder=folder / checkpoint.folder_name(step),
        step=step,
        tp_size=tp_size,
        dp_size=dp_size,
        kinds=KINDS,
        layouts=LAYOUTS,
        files=tuple(files),
        optimizer={"type": "SGD", "groups": [], "steps": {}},
        state={},
        run=RUN,
        ds_config={},
        saved_at="",
    )
    described.check_tiling()
    checkpoint.commit(partial, described.folder, described.manifest())
    return Checkpoint.open(described.folder)


@pytest.mark.parametrize("saved_at", [(1, 1), (2, 3), (4, 1), (2, 7)])
@pytest.mark.parametrize("read_at", [(1, 1), (2, 2), (4, 3), (1, 5)])
def test_any_layout_reads_any_layout(
    tmp_path: Path, saved_at: tuple[int, int], read_at: tuple[int, int]
) -> None:
    """Catches elements that end up elsewhere when a run goes on with other ranks."""
    found = save(tmp_path, 1, *saved_at)
    tp_size, dp_size = read_at
    for name, layout in LAYOUTS.items():
        assert all(np.array_equal(found.tensor(kind, name), logical(name, kind)) for kind in KINDS)
        for tp_rank in range(tp_size):
            expected = {kind: shard(name, kind, tp_rank, tp_size) for kind in KINDS}
            size = len(expected["weight"])
            share = -(-size // dp_size)
            for start in range(0, size, share):
                out = {kind: np.zeros(min(share, size - start), np.float32) for kind in KINDS}
                found.read(name, layout.boxes(tp_rank, tp_size, start, min(start + share, size)), out)
                for kind in KINDS:
                    assert np.array_equal(out[kind], expected[kind][start : start + share]), (name, kind)


def test_safetensors_library_opens_the_files(tmp_path: Path) -> None:
    """Catches files that only this project can read."""
    found = save(tmp_path, 3, 1, 1)
    with safe_open(found.folder / found.files[0].name, framework="np") as file:
        assert file.metadata() == {"step": "3"}
        assert np.array_equal(file.get_tensor("exp_avg/row"), logical("row", "exp_avg").reshape(-1))


@pytest.mark.parametrize("change", ["hole", "overlap", "short"])
def test_slices_that_do_not_tile_are_refused(tmp_path: Path, change: str) -> None:
    """Catches a checkpoint that is committed although elements are missing or there twice."""
    found = save(tmp_path, 1, 1, 3)
    file = found.files[1]
    start, stop = file.slices["column"]
    slices = {"hole": (start + 1, stop), "overlap": (start - 1, stop), "short": (start, stop - 1)}
    broken = dataclasses.replace(file, slices=file.slices | {"column": slices[change]})
    with pytest.raises(CheckpointError, match="of column, TP rank 0, do not fill its 40 elements"):
        dataclasses.replace(found, files=(found.files[0], broken, found.files[2])).check_tiling()


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    """Catches damage that is loaded in silence, and messages that do not say which file."""
    found = save(tmp_path, 1)
    assert found.damage(found.files) == []
    names = [found.folder / file.name for file in found.files]
    flip_bit(names[0], names[0].stat().st_size - 5)
    truncate(names[1], 100)
    names[2].unlink()
    problems = found.damage(found.files)
    assert len(problems) == 3
    for path, what, problem in zip(
        names, ["is damaged", "is truncated", "No such file"], problems, strict=False
    ):
        assert str(path) in problem and what in problem
    manifest = found.folder / "manifest.json"
    text = manifest.read_text()
    for damaged in (text.replace('"step":1', '"step":2'), text[:-20], "", "[]"):
        manifest.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"manifest.json"):
            Checkpoint.open(found.folder)


def test_another_version_is_named(tmp_path: Path) -> None:
    """Catches a KeyError where the version should be named."""
    found = save(tmp_path, 1)
    fields = json.loads((found.folder / "manifest.json").read_text()) | {"format": "megavit-weights-1"}
    (found.folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"its format is 'megavit-weights-1', this version reads"):
        Checkpoint.open(found.folder)


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    """Catches a run that goes on from a half-written, half-deleted or set-aside checkpoint."""
    folder = checkpoint.checkpoints_of(tmp_path)
    assert checkpoint.find_latest(tmp_path) is None
    save(tmp_path, 10)
    for name in ("step_00000020.partial", "step_00000005.old.partial", "step_00000030.damaged"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}")
    latest = checkpoint.find_latest(tmp_path)
    assert latest is not None and latest.name == "step_00000010"
    checkpoint.clean(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step_00000010",
        "step_00000030.damaged",
    ]


def test_the_pointer_decides_and_its_loss_is_no_loss(tmp_path: Path) -> None:
    """Catches a folder that got its name just before a kill taking precedence over what was agreed."""
    for step in (10, 20):
        save(tmp_path, step)
    folder = checkpoint.checkpoints_of(tmp_path)
    checkpoint.point_to(folder / "step_00000010")
    assert checkpoint.open_step(tmp_path).step == 10
    (folder / "latest").unlink()
    assert checkpoint.open_step(tmp_path).step == 20
    (folder / "latest").write_text("step_00000077\n")
    with pytest.raises(CheckpointError, match=r"latest names 'step_00000077', which is missing"):
        checkpoint.find_latest(tmp_path)
    with pytest.raises(CheckpointError, match=r"of step 15; there are: step_00000010, step_00000020"):
        checkpoint.open_step(tmp_path, 15)


def test_pruning_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    """Catches a disk that fills up, and milestones that disappear."""
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, 1, 1)
    folder = checkpoint.checkpoints_of(tmp_path)
    checkpoint.prune(folder, keep=2, keep_every=20)
    assert [path.name[-2:] for path in checkpoint.committed(folder)] == ["20", "40", "50"]


def test_a_damaged_checkpoint_is_set_aside_not_deleted(tmp_path: Path) -> None:
    """Catches a fall-back that destroys evidence, or falls back to nothing and starts from scratch."""
    for step in (10, 20):
        save(tmp_path, step, 1, 1)
    folder = checkpoint.checkpoints_of(tmp_path)
    assert checkpoint.set_aside_latest(tmp_path) == "step_00000010"
    assert (folder / "step_00000020.damaged" / "manifest.json").is_file()
    assert checkpoint.open_step(tmp_path).step == 10
    with pytest.raises(CheckpointError, match="holds no checkpoint before step_00000010"):
        checkpoint.set_aside_latest(tmp_path)
    assert checkpoint.open_step(tmp_path).step == 10


def test_what_latest_names_is_never_deleted(tmp_path: Path) -> None:
    """Catches pruning by the highest number: it deleted the checkpoint that a new start would go on from."""
    for step in (10, 20, 30, 40):
        save(tmp_path, step, 1, 1)
    folder = checkpoint.checkpoints_of(tmp_path)
    checkpoint.point_to(folder / "step_00000020")
    checkpoint.prune(folder, keep=1, keep_every=0)
    assert [path.name[-2:] for path in checkpoint.committed(folder)] == ["20", "30", "40"]
    assert checkpoint.open_step(tmp_path).step == 20


def test_a_run_that_went_back_never_meets_its_other_future(tmp_path: Path) -> None:
    """Catches a save that is reported and then deleted, and a later start that goes on from what was left."""
    run_dir = tmp_path / "run"
    save_steps(run_dir, 4, 8, 12)
    folder = checkpoint.checkpoints_of(run_dir)
    checkpoint.point_to(folder / "step_00000004")
    said: list[str] = []
    found = open_latest(run_dir, "stop", Mesh.single(), said.append)
    assert found is not None and found.step == 4
    assert [line.split()[1] for line in said] == ["step_00000008", "step_00000012"]
    assert names_in(folder) == "04 08.abandoned 12.abandoned latest"
    (folder / "latest").unlink()  # the newest by number must not come back
    assert checkpoint.open_step(run_dir).step == 4
    saver = saver_of(run_dir, keep=1)
    saver.committed_step = 4
    save_steps(run_dir, 8, saver=saver)
    assert checkpoint.open_step(run_dir).step == 8 and names_in(folder) == "08 12.abandoned latest"
    save_steps(run_dir, 16, saver=saver)
    assert checkpoint.open_step(run_dir).step == 16 and names_in(folder) == "16 latest"


def names_in(folder: Path) -> str:
    return " ".join(sorted(path.name.removeprefix("step_000000") for path in folder.iterdir()))


def test_going_back_to_before_a_streak(tmp_path: Path) -> None:
    """Catches a rollback to a checkpoint of the refused streak, and one that a new start undoes."""
    run_dir = tmp_path / "run"
    assert checkpoint.committed_before(run_dir, 100) is None
    saver = save_steps(run_dir, 4, 8, 12, keep=9)
    folder = checkpoint.checkpoints_of(run_dir)
    assert [checkpoint.committed_before(run_dir, step) for step in (3, 4, 7, 8, 99)] == [None, 4, 4, 8, 12]
    assert saver.go_back(3) is None and saver.committed_step == 12
    found = saver.go_back(11)
    assert found is not None and found.step == saver.committed_step == 8
    assert checkpoint.open_step(run_dir).step == 8 and names_in(folder) == "04 08 12.abandoned latest"
    assert checkpoint.committed_before(run_dir, 99) == 8
    checkpoint.point_to(folder / "step_00000004")
    assert checkpoint.committed_before(run_dir, 99) == 4  # the one of step 8 is no longer in the run's past


def test_a_kill_while_a_checkpoint_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pointer to a checkpoint that has just been renamed."""
    for step in (10, 20, 30):
        save(tmp_path, step, 1, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.set_aside_latest(tmp_path)
    assert checkpoint.open_step(tmp_path).step == 20
    with pytest.raises(KeyboardInterrupt):
        checkpoint.go_back(tmp_path, 10)
    assert checkpoint.open_step(tmp_path).step == 10


def test_a_checkpoint_that_cannot_be_deleted_does_not_undo_the_save(tmp_path: Path) -> None:
    """Catches a committed checkpoint that is reported as not saved."""
    saver = save_steps(tmp_path, 4, keep=1)
    (saver.folder / "step_00000004.old.partial" / "in the way").mkdir(parents=True)
    saver.save(8, fields_of(MODEL_RUN, 8))
    assert saver.wait(60)
    (saved,) = saver.finished()
    assert saved.error == "" and saver.committed_step == 8 and checkpoint.open_step(tmp_path).step == 8
    assert "older checkpoints could not be deleted: OSError: " in saved.note and "step_00000004" in saved.note
