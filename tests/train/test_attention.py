"""The largest attention logit that a run logs: exact in every layout, and without a trace in the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh
from megavit.train.ds_config import resolve_ds_config
from tests.ranks import run_ranks
from tests.train.runs import ds_config, small_run, steps_of, train_here
from tests.train.test_engine import BATCH, RUN, batch, inputs
from tests.train.test_engine import ds_config as engine_config

pytestmark = [pytest.mark.dist]


@torch.no_grad()
def expected() -> float:
    """By plain matrix multiplications, over the whole global batch."""
    model, largest = MegaVit.from_config(RUN.model, seed=RUN.seed), 0.0
    heads, head_dim = RUN.model.num_heads, RUN.model.dim // RUN.model.num_heads
    x = model.embed(batch(0)[0])
    for block in model.blocks:
        q, k, _ = F.linear(block.norm(x), block.attn.qkv.weight).chunk(3, -1)
        q, k = (F.rms_norm(t.unflatten(-1, (heads, head_dim)), (head_dim,), eps=1e-6) for t in (q, k))
        largest = max(largest, float(torch.einsum("bnhk,bmhk->bhnm", q, k).abs().max()) / head_dim**0.5)
        x = block(x)
    return largest


def measured(tp_size: int, changes: dict[str, Any], raw: dict[str, Any]) -> float:
    from megavit.train.engine import Engine
    from megavit.train.logging.attention import max_attention

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(RUN, tensor_parallel_size=tp_size, **changes)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    micro_batch = inputs(run, mesh, 0, BATCH // mesh.dp_size)[0]
    if engine.dtype == torch.bfloat16:
        micro_batch = micro_batch._replace(images=micro_batch.images.bfloat16())
    return float(max_attention(engine, micro_batch))


@pytest.mark.parametrize(
    ("ranks", "tp", "changes", "raw"),
    [
        (1, 1, {}, engine_config(0)),
        (2, 2, {"recompute": "selective"}, engine_config(3)),
        (4, 2, {"recompute": "full"}, engine_config(3, BATCH // 2)),
        (2, 1, {}, engine_config(1, BATCH // 2, bf16={"enabled": True})),
    ],
    ids=["one rank", "tp 2, selective", "dp 2 x tp 2, full", "dp 2, bfloat16"],
)
def test_the_largest_is_that_of_all_ranks_in_every_layout(
    ranks: int, tp: int, changes: dict[str, Any], raw: dict[str, Any]
) -> None:
    """Catches a maximum over this rank's heads or images, of one block, or before QK norm and scaling."""
    found = run_ranks(ranks, measured, tp, changes, raw)
    assert found == [pytest.approx(expected(), rel=2e-2 if "bf16" in raw else 1e-5)] * ranks


def test_what_is_no_number_is_infinite() -> None:
    """Catches a NaN that a maximum over ranks loses, and passes over a trunk that does not learn."""
    from megavit.train.logging.attention import learns_attention, max_attention

    class Engine:
        mesh = Mesh.single()

        def __init__(self) -> None:
            self.module = torch.nn.Module()
            self.module.trunk = MegaVit.from_config(RUN.model)
            self.module.trunk.embed.register_forward_hook(lambda *found: found[-1] * torch.nan)
            self.module.forward = lambda images: self.module.trunk(images)

        def call(self, function: Any, *arguments: Any) -> Any:
            return function(self.module, *arguments)

    engine = Engine()
    assert max_attention(engine, batch(0)[0]) == torch.inf  # type: ignore[arg-type]
    assert learns_attention(engine.module)
    engine.module.trunk.requires_grad_(False)
    assert not learns_attention(engine.module)
    engine.module.trunk = torch.nn.Identity()
    assert not learns_attention(engine.module)


@pytest.mark.slow
def test_measuring_leaves_the_training_as_it_is(digits: Path, tmp_path: Path) -> None:
    """Catches dropout, data or ZeRO-3's gathered weights that depend on how often a run logs."""
    rows = {}
    for every in (1, 4):
        run_dir = tmp_path / f"every{every}"
        run = small_run(digits, run_dir, log_every=every, max_steps=8, model__dropout=0.1)
        assert run_ranks(2, train_here, run, ds_config(3, micro_batch=12)) == [""] * 2
        rows[every] = {row["step"]: row for row in steps_of(run_dir)}
    for step in (1, 4, 8):
        for key in ("loss", "grad_norm", "max_logit"):
            assert rows[1][step][key] == rows[4][step][key], (step, key)
    assert rows[1].keys() == set(range(1, 9)) and all(row["max_logit"] > 0 for row in rows[1].values())
