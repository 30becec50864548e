"""The engine and whole runs in bfloat16 on a GPU: losses, refusals, resuming to the bit, synchronisations.
They need DeepSpeed."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megavit.parallel.mesh import Mesh
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from tests.gpu.devices import on_both

pytest.importorskip("deepspeed", reason="needs DeepSpeed")

from tests.train.runs import ds_config, small_run, steps_of
from tests.train.test_engine import BATCH, LR, RUN, WEIGHTS, inputs, shards_of
from tests.train.test_engine import ds_config as engine_config

BF16 = {"bf16": {"enabled": True}}


def needs_compiler(raw: dict[str, Any], device: str) -> None:
    fused_adam = raw["optimizer"]["params"].get("torch_adam") is False
    if fused_adam and (device == "cpu" or not shutil.which("nvcc")):
        pytest.skip("DeepSpeed's FusedAdam needs a GPU and nvcc")


def engine_on(device: str, raw: dict[str, Any], mesh: Mesh, run: RunConfig = RUN) -> Any:
    from megavit.train.engine import Engine

    assert mesh.device.type == device
    return Engine(run, resolve_ds_config(raw, mesh.dp_size, device), mesh)


def micro_batches(engine: Any, step: int) -> list[Any]:
    return [
        type(part)(*(tensor.to(engine.mesh.device) for tensor in part))
        for part in inputs(engine.run, engine.mesh, step, engine.micro_batch)
    ]


def run_steps(engine: Any, first: int, last: int) -> list[float]:
    weight = WEIGHTS.sum().to(engine.mesh.device)
    return [engine.train_step(micro_batches(engine, step), weight, LR).loss for step in range(first, last)]


def with_adam(raw: dict[str, Any], torch_adam: bool) -> dict[str, Any]:
    params = raw["optimizer"]["params"] | {"torch_adam": torch_adam} | ({"fused": True} if torch_adam else {})
    return raw | {"optimizer": raw["optimizer"] | {"params": params}}


@on_both
@pytest.mark.parametrize("torch_adam", [True, False], ids=["torch", "FusedAdam"])
def test_the_engine_in_bfloat16_follows_plain_pytorch(device: str, torch_adam: bool) -> None:
    """Catches gradients that are reduced, or weights that are updated, before they are there: ZeRO-3 runs on
    streams of its own."""
    from tests.train.test_engine import STEPS, plain_pytorch

    raw = with_adam(engine_config(3, BATCH // 2, **BF16), torch_adam)
    needs_compiler(raw, device)
    engine = engine_on(device, raw, Mesh.from_environment(1))
    assert run_steps(engine, 0, STEPS) == pytest.approx(plain_pytorch(RUN)["losses"], rel=2e-2)
    steps = {type(state["step"]) for state in engine._deepspeed.basic_optimizer.state.values()}
    assert steps == {torch.Tensor if torch_adam else int}
    if torch_adam:
        where = {state["step"].device.type for state in engine._deepspeed.basic_optimizer.state.values()}
        assert where == {device}


@on_both
@pytest.mark.parametrize("stage", [2, 3])
def test_a_poisoned_gradient_is_refused_on_the_device(device: str, stage: int) -> None:
    """Catches an update that the device applies while the host does not know yet that it is refused."""
    mesh = Mesh.from_environment(1)
    outcomes, weights = [], []
    for is_poisoned in (True, False):
        engine = engine_on(device, with_adam(engine_config(stage, **BF16), True), mesh)
        run_steps(engine, 0, 1)
        if is_poisoned:
            bad = [part._replace(images=part.images * torch.nan) for part in micro_batches(engine, 0)]
            weight = WEIGHTS.sum().to(mesh.device)
            pending = engine.start_step(bad, weight, LR, lambda: 1e9)
            assert not pending.is_read
            outcomes.append(pending.result().refused)
        run_steps(engine, 1, 2)
        weights.append(shards_of(engine))
    assert "loss is nan" in outcomes[0]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def train(run: RunConfig, raw: dict[str, Any]) -> None:
    from megavit.train.loop import train
    from megavit.train.preempt import StopRequest

    train(run, raw, Mesh.from_environment(), StopRequest())


@on_both
@pytest.mark.parametrize("torch_adam", [True, False], ids=["torch", "FusedAdam"])
def test_a_run_goes_on_to_the_bit(digits: Path, tmp_path: Path, device: str, torch_adam: bool) -> None:
    """Catches moments, updates counted or random state that are lost on a GPU; evaluation and observer run
    in it too."""
    raw = with_adam(ds_config(3) | BF16, torch_adam)
    needs_compiler(raw, device)
    changes = {"max_steps": 8, "recompute": "selective", "model__dropout": 0.1, "data__workers": 0}
    changes |= {"data__val_shards": f"{digits}/test-*.tar"}
    torch.use_deterministic_algorithms(True, warn_only=True)  # flash attention adds in a fixed order then
    try:
        run = small_run(digits, tmp_path / "whole", **changes)
        train(run, raw)
        run = small_run(digits, tmp_path / "halves", **changes)
        train(dataclasses.replace(run, stop_at_step=4), raw)
        train(run, raw)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, halves = steps_of(tmp_path / "whole"), steps_of(tmp_path / "halves")
    keys = ("step", "loss", "grad_norm", "max_logit")
    assert [[row[key] for key in keys] for row in halves] == [[row[key] for key in keys] for row in whole]
    assert len(whole) == 8
    shutil.rmtree(tmp_path)


@on_both
def test_compiled_blocks_under_zero_3_stay_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hooks of ZeRO-3 inside of a compiled block, which break its graph, and a block that is compiled
    again in later steps."""
    if device == "cpu":
        compile_with = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f: compile_with(f, fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()
    run = dataclasses.replace(RUN, compile=True, recompute="selective")
    engine = engine_on(device, with_adam(engine_config(3, **BF16), True), Mesh.from_environment(1), run)
    first = run_steps(engine, 0, 2)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        later = run_steps(engine, 2, 4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(loss > 0 for loss in first + later)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_makes_the_host_wait_at_most_once(stage: int) -> None:
    """Catches synchronisations that a CPU does not show: copies that wait, streams, timers."""
    mesh = Mesh.from_environment(1)
    kept = {"stage3_param_persistence_threshold": 1000}  # norms and biases, gathered again after each update
    raw = with_adam(engine_config(stage, BATCH // 2, zero=kept, **BF16), True)
    engine = engine_on("cuda", raw, mesh)
    run_steps(engine, 0, 4)
    weight, parts = WEIGHTS.sum().to(mesh.device), micro_batches(engine, 1)
    torch.cuda.synchronize()
    waits: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "synchronize", lambda *device: waits.append("synchronize"))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            pending = engine.start_step(parts, weight, LR, lambda: 1e9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert waits == []
    assert pending.result().refused == ""
