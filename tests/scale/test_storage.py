"""Checkpoint I/O as planned against what ranks write."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megavit.model.count import num_params
from megavit.parallel.mesh import Mesh
from megavit.recipe import RECIPES, read_recipe
from megavit.scale.job import Layout
from megavit.scale.storage import checkpoint_cost
from megavit.train.config import CheckpointConfig
from megavit.train.ds_config import resolve_ds_config
from tests.ranks import run_ranks

RUN = read_recipe(RECIPES / "digits.yaml")


def save(folder: Path, tp_size: int, ds_config: dict[str, Any], freeze: str = "") -> None:
    from megavit.train.checkpoint.saver import Saver
    from megavit.train.config import plain_config
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(RUN, tensor_parallel_size=tp_size, freeze=freeze)
    engine = Engine(run, resolve_ds_config(ds_config, mesh.dp_size, "cpu"), mesh)
    saver = Saver(folder, CheckpointConfig(), mesh, engine.state, 0)
    saver.save(1, {"state": {}, "run": plain_config(run), "ds_config": {}})
    assert saver.wait(60) and saver.committed_step == 1


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["", "trunk.embed,trunk.blocks.0"])
def test_ranks_write_what_is_planned(tmp_path: Path, freeze: str) -> None:
    """Catches a rank that writes more than its share, frozen weights that only the plan writes, and a
    manifest that grows otherwise than planned."""
    ds_config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3},
    }
    run_ranks(4, save, tmp_path, 2, ds_config, freeze)
    planned = checkpoint_cost(dataclasses.replace(RUN, freeze=freeze), Layout(2, 2, 4))
    folder = tmp_path / "checkpoints" / "step_00000001"
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == planned.files == 4
    headers = 32_768  # names and offsets, and the states of the random generators
    assert planned.total_bytes < sum(sizes) < planned.total_bytes + 4 * headers
    assert planned.most_bytes < max(sizes) < planned.most_bytes + headers
    found = json.loads((folder / "manifest.json").read_text())
    found["state"], found["ds_config"] = {}, {}
    assert len(json.dumps(found, separators=(",", ":"))) == pytest.approx(planned.manifest_bytes, abs=1000)


@pytest.mark.parametrize(("tp", "dp"), [(8, 8), (1, 64), (8, 64)])
def test_22b_is_written_in_equal_shares(tp: int, dp: int) -> None:
    """Catches a layout that makes one rank write for others, or a manifest that grows out of hand."""
    run = read_recipe(RECIPES / "vit_22b_jft.yaml")
    cost = checkpoint_cost(run, Layout(tp, dp, 1))
    assert 1 <= cost.total_bytes / (12 * num_params(run.model)) < 1.00001  # classes are padded
    assert cost.most_bytes < 1.01 * cost.total_bytes / (tp * dp)
    assert cost.manifest_bytes < 10e6
