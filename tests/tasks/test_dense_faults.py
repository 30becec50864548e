"""What goes wrong in runs of dense heads: kills, damage, changed exports, drifting copies; and exact results
of uneven batches."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megavit.data.loader import EvalLoader
from megavit.model.vit import MegaVit
from megavit.tasks.config import DepthConfig
from megavit.train.checkpoint.folder import checkpoints_of, committed
from megavit.train.config import RunConfig
from tests.data.shards import flip_bit
from tests.ranks import run_ranks
from tests.tasks.dense_data import write_dense
from tests.tasks.test_dense import HEADS, MODEL, dense_run, losses, result
from tests.train.runs import ds_config, log_of, train_here

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"), train=96, test=7)


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    """An export of drawn weights."""
    folder = tmp_path / "trunk"
    folder.mkdir()
    save_file(MegaVit.from_config(MODEL, seed=5).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(MODEL)))
    return folder


def train_until_killed(run: RunConfig, raw: dict[str, Any]) -> str:
    """In a fresh rank: `train_here`, in which rank 1 is killed in the middle of the first evaluation, with
    all saves committed."""
    from megavit.train import loop

    def die(done: int) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    def evaluate(self: loop.Trainer, name: str, loader: EvalLoader) -> dict[str, float]:
        self.saver.wait()
        loop.evaluate(self.engine, loader, self.bad_samples, self.step, self.watchdog, die)
        signal.pause()  # until the test ends the others
        return {}

    loop.Trainer._evaluate = evaluate  # type: ignore[method-assign]
    return train_here(run, raw)


@pytest.mark.slow
def test_kills_damage_and_changed_exports(data: Path, trunk: Path, tmp_path: Path) -> None:
    """Catches a decoder's weights, moments or frozen trunk that come back otherwise at another (ranks, TP,
    ZeRO stage) after a kill in an evaluation, an evaluation that is left out, a damaged checkpoint that is
    used, a trunk that was exchanged meanwhile, and another head on old weights."""
    changes = {"init_from": str(trunk), "checkpoint__every": 3, "eval_every": 8, "max_steps": 12}
    run = dense_run(data, tmp_path / "run", HEADS["dpt"], **changes)
    whole = dataclasses.replace(run, run_dir=str(tmp_path / "whole"))
    assert run_ranks(1, train_here, whole, ds_config(2)) == [""]
    at_two = dataclasses.replace(run, tensor_parallel_size=2)
    with pytest.raises(AssertionError, match=f"ended with -{signal.SIGKILL}"):
        run_ranks(2, train_until_killed, at_two, ds_config(3, micro_batch=24), fresh=True)
    assert [folder.name for folder in committed(checkpoints_of(Path(run.run_dir)))] == [
        "step_00000003",
        "step_00000006",
    ]

    def again(changed: RunConfig = run) -> str:
        (error,) = run_ranks(1, train_here, changed, ds_config(0))
        return str(error)

    other_head = again(dataclasses.replace(run, task=DepthConfig(head="linear")))
    assert "task.head is linear, was dpt" in other_head and "--run_dir" in other_head

    weights = trunk / "model.safetensors"
    flip_bit(weights, weights.stat().st_size - 1)
    changed = again()
    assert changed.count("digest") == 2 and str(trunk) in changed and "--init_from" in changed
    flip_bit(weights, weights.stat().st_size - 1)
    moved = trunk.with_name("moved")
    shutil.move(trunk, moved)
    missing = again()
    assert str(trunk) in missing and "name its place with --init_from" in missing

    file = committed(checkpoints_of(Path(run.run_dir)))[-1] / "rank_00001.safetensors"
    flip_bit(file, file.stat().st_size // 2)
    run = dataclasses.replace(run, init_from=str(moved))
    damaged = again(run)
    assert f"{file.parent.name}/{file.name} is damaged" in damaged and "on_damage previous" in damaged
    previous = dataclasses.replace(run.checkpoint, on_damage="previous")
    assert again(dataclasses.replace(run, checkpoint=previous)) == ""
    assert [row["step"] for row in log_of(Path(run.run_dir)) if row.get("event") == "resumed"][-1:] == [3]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    for one in ("run", "whole"):
        assert [row["step"] for row in log_of(tmp_path / one) if row.get("eval") == "val"] == [8, 12]
    expected = result(tmp_path / "whole", "abs_rel")
    assert result(tmp_path / "run", "abs_rel") == pytest.approx(expected, rel=1e-4)


def drift(run: RunConfig, names: list[str]) -> tuple[list[str], list[str]]:
    """In a rank: what two comparisons of the replicas find after one bit was flipped in TP rank 1's copy of
    each of `names`."""
    from megavit.parallel.mesh import Mesh
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(2)
    engine = Engine(run, resolve_ds_config(ds_config(2), mesh.dp_size, "cpu"), mesh)
    for part in engine.state.slices():
        if part.name in names and mesh.tp_rank == 1 and part.stop > part.start:
            part.tensors["weight"].view(torch.int32)[-1] ^= 1
    return engine.state.align_replicas(), engine.state.align_replicas()


def test_a_flipped_bit_of_a_replicated_head_is_found(data: Path, tmp_path: Path) -> None:
    """Catches heads and their running statistics that TP ranks hold in different copies without anybody
    noticing."""
    run = dense_run(data, tmp_path / "run", HEADS["linear"], tensor_parallel_size=2)
    names = ["decoder.convolution.weight", "decoder.norm.running_var"]
    assert run_ranks(2, drift, run, names) == [(names, [])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpt", "linear"])
def test_uneven_batches_are_measured_exactly(data: Path, tmp_path: Path, name: str) -> None:
    """Catches images that count twice, or not at all, where the last batches of the ranks are not full, and
    means over batches or ranks: 7 images over 2 ranks with micro-batches of 2, and over 4 ranks with TP."""
    found = []
    for ranks, tp, micro_batch in ((1, 1, 4), (2, 1, 2), (4, 2, 2)):
        changes = {"tensor_parallel_size": tp, "max_steps": 1, "eval_every": 1}
        run = dense_run(data, tmp_path / str(ranks), HEADS[name], **changes)
        raw = ds_config(2, batch=4, micro_batch=micro_batch)
        raw["optimizer"]["params"] |= {"lr": 1e-12, "weight_decay": 0.0}
        assert run_ranks(ranks, train_here, run, raw) == [""] * ranks
        (row,) = (row for row in log_of(tmp_path / str(ranks)) if row.get("eval") == "val")
        found.append({key: value for key, value in row.items() if key.startswith("eval/val/")})
    assert found[0]["eval/val/samples"] == 7 and len(found[0]) > 4
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-5)  # TP adds in another order, and a logarithm follows
