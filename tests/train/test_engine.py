"""DeepSpeed's ZeRO stages, recompute policies, accumulation and precision against plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch

from megavit.model.vit import MegaVit
from megavit.parallel.init import logical_parameters
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from megavit.tasks.classify import Inputs
from megavit.tasks.config import ClassifyConfig
from megavit.tasks.loss import image_losses, local_targets
from megavit.tasks.task import make_task
from megavit.train.config import RunConfig
from megavit.train.ds_config import resolve_ds_config
from megavit.train.optim import optimizer_groups
from tests.ranks import run_ranks
from tests.train.runs import DEMO

STEPS, BATCH, LR = 4, 8, 3e-3
RUN = dataclasses.replace(DEMO, model=dataclasses.replace(DEMO.model, depth=2, num_classes=7))


def ds_config(stage: int, micro_batch: int = BATCH, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1}},
        "zero_optimization": zero | more.pop("zero", {}),
    } | more


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(BATCH, 1, 8, 8, generator=generator) * 2 - 1
    return images, torch.randint(0, 7, (BATCH,), generator=generator)


# Two bad samples, on one rank of two and in one micro-batch: the loss is divided by the weights of the whole
# batch.
WEIGHTS = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])


def inputs(run: RunConfig, mesh: Mesh, step: int, micro_batch: int) -> list[Inputs]:
    share = BATCH // mesh.dp_size
    images, labels, weights = (t[mesh.dp_rank * share :][:share] for t in (*batch(step), WEIGHTS))
    targets = local_targets(run.task.loss, labels[:, None], 7, mesh)
    parts = zip(*(t.split(micro_batch) for t in (images, targets, labels[:, None], weights)), strict=True)
    return [Inputs(*part) for part in parts]


LAYERS_ABOVE = {"embed": 3, "blocks.0": 2, "blocks.1": 1, "norm": 1, "pool": 0, "head": 0}


def plain_groups(run: RunConfig, model: MegaVit) -> list[dict[str, Any]]:
    """A group for each parameter, with the rate of its layer."""
    task = make_task(run.task, run.model, run.data)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer_groups(task, logical_parameters(model), 0.1):
        for parameter in group["params"]:
            (above,) = (n for part, n in LAYERS_ABOVE.items() if names[id(parameter)].startswith(f"{part}."))
            lr = LR * run.schedule.layer_decay**above
            groups.append({"params": [parameter], "weight_decay": group["weight_decay"], "lr": lr})
    return groups


def plain_pytorch(run: RunConfig) -> dict[str, Any]:
    """The same steps with nothing but torch: what every engine must reproduce."""
    model = MegaVit.from_config(run.model, seed=run.seed)
    optimizer = torch.optim.AdamW(plain_groups(run, model))
    losses, norms = [], []
    for step in range(STEPS):
        images, labels = batch(step)
        targets = local_targets(run.task.loss, labels[:, None], 7, Mesh.single())
        per_image = image_losses(run.task.loss, model(images), targets, 7, Mesh.single())
        loss = (per_image * WEIGHTS).sum() / WEIGHTS.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def predict(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return module.trunk(images)


def shards_of(engine: Any) -> dict[str, torch.Tensor]:
    """Each parameter's TP shard, float32, gathered from the master copies of the DP ranks."""
    from megavit.parallel.collectives import sum_over_dp

    shards = {}
    for name, parameter in engine.parameters.items():
        layout = layout_of(parameter)
        shards[name] = torch.zeros(layout.local_shape(engine.mesh.tp_size)).flatten()
        for part in engine.state.slices():
            if part.name == name:
                shards[name][part.start : part.stop] = part.tensors["weight"]
        if engine.state._stage:
            shards[name] = sum_over_dp(engine.mesh, shards[name])
        shards[name] = shards[name].view(layout.local_shape(engine.mesh.tp_size))
    return shards


def run_engine(tp_size: int, run: RunConfig, raw: dict[str, Any]) -> float | dict[str, float]:
    """The largest relative differences of one engine's losses, norms and weights from plain PyTorch."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(run, tensor_parallel_size=tp_size)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    expected = plain_pytorch(run)
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step(inputs(run, mesh, step, engine.micro_batch), WEIGHTS.sum(), LR)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    layouts = {name: layout_of(p) for name, p in engine.parameters.items()}
    weights = 0.0
    for name, shard in shards_of(engine).items():
        mine = layouts[name].take(expected["weights"][name], mesh.tp_rank, mesh.tp_size)
        weights = max(weights, float((shard - mine).abs().max()))
    pairs = {"losses": losses, "norms": norms}
    relative = {k: max(abs(a / b - 1) for a, b in zip(v, expected[k], strict=True)) for k, v in pairs.items()}
    return relative | {"weights": weights}


DECAYED = {"schedule": dataclasses.replace(RUN.schedule, layer_decay=0.75)}
CASES = {
    "stage 0, tp 2": (2, 2, {}, ds_config(0)),
    "stage 1, dp 2": (2, 1, {}, ds_config(1)),
    "stage 2, dp 2 x tp 2": (4, 2, {}, ds_config(2, micro_batch=2)),
    "stage 3, one rank": (1, 1, {"task": ClassifyConfig(loss="softmax")}, ds_config(3)),
    "stage 3, dp 2 x tp 2, accumulation": (4, 2, {}, ds_config(3, micro_batch=1)),
    "stage 3, tp 4": (4, 4, {}, ds_config(3)),
    "stage 3, dp 2, selective": (2, 1, {"recompute": "selective"}, ds_config(3)),
    "stage 3, tp 2, full": (2, 2, {"recompute": "full"}, ds_config(3)),
    "stage 3, dp 2, persistent": (
        2,
        1,
        {},
        ds_config(3, zero={"stage3_param_persistence_threshold": 100_000}),
    ),
    "stage 0, one rank, layer decay": (1, 1, DECAYED, ds_config(0)),
    "stage 3, tp 2, layer decay": (2, 2, DECAYED, ds_config(3)),
    "stage 2, dp 4, layer decay": (4, 1, DECAYED, ds_config(2, micro_batch=2)),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_layout_takes_the_same_steps_as_plain_pytorch(case: str) -> None:
    """Catches wrong gradient averaging, clipping by a rank's own norm, decay or rates lost with groups, stale
    gathered weights."""
    ranks, tp_size, change, raw = CASES[case]
    for found in run_ranks(ranks, run_engine, tp_size, dataclasses.replace(RUN, **change), raw):
        assert found["losses"] < 1e-5 and found["norms"] < 1e-5 and found["weights"] < 1e-4, found


def loads_inductor() -> bool:
    run_engine(1, RUN, ds_config(3))
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.dist
def test_eager_steps_do_not_load_the_compiler() -> None:
    """Catches the second that each start lost to DeepSpeed's Muon, which is compiled on import."""
    assert run_ranks(1, loads_inductor, fresh=True) == [False]


@pytest.mark.dist
def test_bfloat16_stays_close() -> None:
    """Catches bf16 runs whose float32 master weights are not what is read back: 2^-9 of a weight is more than
    2e-3."""
    raw = ds_config(3, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    for found in run_ranks(2, run_engine, 2, RUN, raw):
        assert found["losses"] < 5e-3 and found["weights"] < 2e-2, found


def poisoned(tp_size: int, raw: dict[str, Any], where: str) -> list[Any]:
    """Train a good, a poisoned and a good step; what the second said, whether the weights stayed, and how far
    the third is from a run that never had the second."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(RUN, tensor_parallel_size=tp_size)
    outcomes, weights = [], []
    for poison in (True, False):
        engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
        parts = inputs(run, mesh, 0, engine.micro_batch)
        engine.train_step(parts, WEIGHTS.sum(), LR)
        if poison:
            before, bad, limit = shards_of(engine), list(parts), float("inf")
            if where == "loss" and mesh.dp_rank == 1:
                bad[-1] = bad[-1]._replace(images=bad[-1].images * float("nan"))
            if where == "gradient" and mesh.dp_rank == 1:
                norm = engine.parameters["norm.weight"]
                handle = norm.register_hook(lambda grad: grad * float("inf"))
            if where == "spike":
                limit = 1e-6
            outcomes.append(engine.train_step(bad, WEIGHTS.sum(), LR, limit))
            if where == "gradient" and mesh.dp_rank == 1:
                handle.remove()
            after = shards_of(engine)
            unchanged = all(torch.equal(before[name], after[name]) for name in before)
        outcomes.append(engine.train_step(inputs(run, mesh, 1, engine.micro_batch), WEIGHTS.sum(), LR))
        weights.append(shards_of(engine))
    refused, with_it, without_it = outcomes
    same = with_it == without_it and all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    return [refused.refused, unchanged, with_it.refused == "" and same]


OFFLOAD = ds_config(3, zero={"offload_optimizer": {"device": "cpu"}})


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient", "spike"])
@pytest.mark.parametrize(
    "raw",
    [ds_config(0), ds_config(1), ds_config(2, micro_batch=2), ds_config(3, micro_batch=2), OFFLOAD],
    ids=["stage 0", "stage 1", "stage 2, accumulation", "stage 3, accumulation", "stage 3, offloaded"],
)
def test_a_refused_update_leaves_no_trace(raw: dict[str, Any], where: str) -> None:
    """Catches weights or moments moved by a bad gradient, and gradients that survive into the next step."""
    expected = {
        "loss": "loss is nan on rank(s) 1",
        "gradient": "gradient norm",
        "spike": "is above 1e-06",
    }[where]
    for message, unchanged, same in run_ranks(2, poisoned, 1, raw, where):
        assert expected in message
        assert unchanged and same


@pytest.mark.dist
def test_tensor_parallel_ranks_refuse_together() -> None:
    """Catches TP ranks that judge by their own shard's norm."""
    for message, unchanged, same in run_ranks(2, poisoned, 2, ds_config(3), "spike"):
        assert "is above 1e-06" in message and unchanged and same


def one_rank_refuses(tp_size: int, raw: dict[str, Any]) -> tuple[str, bool]:
    """What a step says whose norm only the last rank finds too large, and whether the weights stayed."""
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(tp_size)
    run = dataclasses.replace(RUN, tensor_parallel_size=tp_size)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    before = shards_of(engine)
    limit = 1e-6 if mesh.global_rank == mesh.world_size - 1 else math.inf
    result = engine.train_step(inputs(run, mesh, 0, engine.micro_batch), WEIGHTS.sum(), LR, limit)
    after = shards_of(engine)
    return result.refused, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_one_rank_refuses_all_refuse(stage: int) -> None:
    """Catches ranks that judge by themselves: one that skips an update has other weights from then on."""
    for refused, unchanged in run_ranks(4, one_rank_refuses, 2, ds_config(stage)):
        assert "gradient norm" in refused and unchanged


def numbers_read_back() -> tuple[tuple[float, ...], float]:
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(1)
    engine = Engine(RUN, resolve_ds_config(ds_config(3), mesh.dp_size, "cpu"), mesh)
    read = torch.tensor([8.0, 1.0])
    result = engine.train_step(inputs(RUN, mesh, 0, engine.micro_batch), WEIGHTS.sum(), LR, read=read)
    return result.read, result.loss


@pytest.mark.dist
def test_a_step_reads_the_callers_numbers_with_its_own() -> None:
    """Catches numbers that come back in another order, or mixed with the loss."""
    ((read, loss),) = run_ranks(1, numbers_read_back)
    assert read == (8.0, 1.0) and loss > 0


def drift(raw: dict[str, Any], parameter: str, kind: str) -> tuple[list[str], list[str], bool, bool]:
    """Move the last TP rank's copy of a replicated parameter; what two comparisons then find, whether all
    ranks hold TP rank 0's values, and whether their predictions are the same."""
    from megavit.parallel.collectives import max_over_tp
    from megavit.train.engine import Engine

    mesh = Mesh.from_environment(2)
    run = dataclasses.replace(RUN, tensor_parallel_size=2)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    engine.train_step(inputs(run, mesh, 0, engine.micro_batch), WEIGHTS.sum(), LR)
    for part in engine.state.slices():
        if part.name == parameter and mesh.tp_rank == 1 and part.stop > part.start:
            part.tensors[kind][-1] += 1e-3
    found = engine.state.align_replicas(), engine.state.align_replicas()
    same = True
    for part in engine.state.slices():
        if part.name == parameter:
            values = torch.cat([part.tensors[kind], -part.tensors[kind]])
            same = not bool((max_over_tp(mesh, values).view(2, -1).sum(0) != 0).any())
    images, _ = batch(1)
    with torch.no_grad():
        logits = engine.call(predict, images.to(engine.dtype))
    return *found, same, torch.equal(max_over_tp(mesh, logits), logits)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("raw", "parameter", "kind"),
    [
        (ds_config(3, micro_batch=2), "blocks.0.norm.weight", "weight"),
        (ds_config(2, micro_batch=2, bf16={"enabled": True}), "norm.weight", "weight"),
        (ds_config(0, micro_batch=2), "embed.bias", "exp_avg_sq"),
    ],
    ids=["stage 3", "stage 2, bf16", "stage 0, moments"],
)
def test_a_replica_that_drifts_is_found_and_replaced(raw: dict[str, Any], parameter: str, kind: str) -> None:
    """Catches TP ranks whose copies of a norm part company, of which a checkpoint then keeps one."""
    for first, second, same, agree in run_ranks(4, drift, raw, parameter, kind):
        assert first == [parameter] and second == []
        assert same and agree


def misread_state() -> str:
    from megavit.train import zero_state
    from megavit.train.engine import Engine

    place = zero_state.ZeroState._place

    def shifted(self: Any, parameter: Any) -> Any:
        flat, offset, start, stop = place(self, parameter)
        return flat, offset + 1, start, stop

    zero_state.ZeroState._place = shifted  # type: ignore[method-assign]
    try:
        Engine(RUN, resolve_ds_config(ds_config(3), 1, "cpu"), Mesh.from_environment(1))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_start_notices_buffers_that_it_misreads() -> None:
    """Catches a DeepSpeed whose private buffers lie otherwise than `zero_state` believes."""
    (error,) = run_ranks(1, misread_state, fresh=True)
    assert "are not those that DeepSpeed reports" in error


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an upgrade under which patches and private attributes silently mean something else."""
    from megavit.train import ds_patches

    monkeypatch.setattr(ds_patches, "VERSION", "0.20.0")
    with pytest.raises(ImportError, match=r"works with 0\.20\.0 only"):
        ds_patches._require_version()


def counts_of_updates() -> list[str]:
    from megavit.train.engine import Engine

    raw = ds_config(3)
    raw["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    engine = Engine(RUN, resolve_ds_config(raw, 1, "cpu"), Mesh.from_environment(1))
    fused = engine.state._count(torch.empty(1, device="meta"), 3)
    for group in engine._deepspeed.basic_optimizer.param_groups:
        group["fused"] = False
    plain = engine.state._count(torch.empty(1, device="meta"), 3)
    return [fused.device.type, plain.device.type]


@pytest.mark.dist
def test_a_fused_optimizer_counts_where_its_weights_are() -> None:
    """Catches a resumed run on a GPU whose fused Adam is handed a count on the CPU, and refuses it."""
    assert run_ranks(1, counts_of_updates) == [["meta", "cpu"]]
