"""What an observer sees: attention weights, token states and their gradients, on every rank and under every
recompute policy."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megavit import MegaVit
from megavit.model.block import attention_weights
from megavit.parallel.mesh import Mesh
from tests.model.test_vit import SMALL, images
from tests.ranks import run_ranks
from tests.train.test_engine import BATCH, RUN, ds_config, inputs

VARIANTS: dict[str, dict[str, Any]] = {
    "vit-22b": {},
    "registers": {"num_registers": 2, "layer_scale": 0.5, "qkv_bias": True, "dropout": 0.2},
    "class token": {"pool": "cls", "norm_centring": True, "norm_bias": True},
    "sequential": {"block": "sequential", "qk_norm": False},
}


def build(recompute: Any = "none", mesh: Mesh | None = None, **fields: Any) -> MegaVit:
    model = MegaVit(**(SMALL | {"depth": 3} | fields), recompute=recompute, mesh=mesh, seed=1)
    head = model.head
    assert head is not None
    logical = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # the zero head would stop every gradient
        head.weight.copy_(head.weight.tp_layout.take(logical, model.mesh.tp_rank, model.mesh.tp_size))
    return model


class Recorder:
    """Everything that it is told, and, by hooks, the gradients, under the names of what they belong to."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def queries_keys(self, layer: int, q: Tensor, k: Tensor) -> None:
        self._record(f"queries {layer}", q)
        self._record(f"keys {layer}", k)

    def attention(self, layer: int, weights: Tensor) -> None:
        (weights * weights).sum()  # must not become part of what is recomputed
        self._record(f"attention {layer}", weights)

    def tokens(self, layer: int, x: Tensor) -> None:
        self._record(f"tokens {layer}", x)

    def pool(self, weights: Tensor) -> None:
        self._record("pool", weights)

    def _record(self, name: str, tensor: Tensor) -> None:
        assert name not in self.seen, f"{name} is told twice"
        self.seen[name] = tensor.detach().clone()
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._record_grad(name, grad))

    def _record_grad(self, name: str, grad: Tensor) -> None:
        assert name not in self.grads, f"the gradient of {name} comes twice"
        self.grads[name] = grad.clone()


def observed(model: MegaVit) -> tuple[Recorder, Tensor]:
    """What one forward and backward pass of two classes' scores tells, and the logits."""
    torch.manual_seed(3)
    with model.observe(Recorder()) as recorder:
        logits = model(images(2))
    logits[:, [1, 3]].sum().backward()
    return recorder, logits.detach()


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        bool((found[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3))
        for name, value in expected.items()
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_tensors_are_those_that_the_logits_come_from(name: str) -> None:
    """Catches maps beside the path that the model takes, and an explicit path that computes something else
    than the fused one."""
    fields = VARIANTS[name]
    model, maps, states = build(**fields), [], []

    class Keeper:
        def attention(self, layer: int, weights: Tensor) -> None:
            assert layer == len(maps)
            maps.append(weights)

        def tokens(self, layer: int, x: Tensor) -> None:
            assert layer == len(states) - 1
            states.append(x)

        def pool(self, weights: Tensor) -> None:
            maps.append(weights)

    torch.manual_seed(3)
    with model.observe(Keeper()):
        logits = model(images(2))
    torch.manual_seed(3)
    assert (model(images(2)) - logits).abs().max() < 1e-5 * logits.abs().max()
    tokens = 16 + model.config.num_prefix_tokens
    shapes = [(2, 4, tokens, tokens)] * 3 + [(2, 4, 16)] * (model.pool is not None)
    assert [tuple(m.shape) for m in maps] == shapes
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:-1]), atol=1e-5) for m in maps)
    assert [tuple(x.shape) for x in states] == [(2, tokens, 32)] * 4
    if not model.config.dropout:
        torch.testing.assert_close(model.forward_head(model.norm(states[-1])), logits)
    grads = torch.autograd.grad(logits[:, 1].sum(), [*maps, *states])
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name", VARIANTS)
def test_queries_and_keys_are_those_of_the_attention_weights(name: str) -> None:
    """Catches queries and keys before QK norm, without their scales, or of another layer."""
    model = build(**VARIANTS[name])
    for part, parameter in model.named_parameters():
        if part.endswith("_scale"):
            torch.nn.init.uniform_(parameter, 0.5, 2.0, generator=torch.Generator().manual_seed(5))
    seen = observed(model)[0].seen
    for layer in range(3):
        q, k = seen[f"queries {layer}"], seen[f"keys {layer}"]
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(weights, seen[f"attention {layer}"])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recompute_policy_tells_the_same(name: str) -> None:
    """Catches observers that are told twice, by recomputation, and gradients that pass them by."""
    plain, logits = observed(build(**VARIANTS[name]))
    assert plain.seen.keys() == plain.grads.keys() and len(plain.grads) == 13 + ("pool" in plain.seen)
    for policy in ["full"] if name == "sequential" else ["full", "selective"]:
        other, same = observed(build(policy, **VARIANTS[name]))
        assert torch.equal(logits, same)
        assert close(other.seen, plain.seen) and close(other.grads, plain.grads), policy


def test_an_attention_gradient_is_a_finite_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient that lacks a path to the score: against weights of one block that are moved."""
    model = build().double()
    direction = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    layer, made = 1, []

    def moved_score(step: float) -> tuple[Recorder, Tensor]:
        made.clear()

        def moved(q: Tensor, k: Tensor) -> Tensor:
            made.append(attention_weights(q, k))
            return made[-1] + (step * direction if len(made) == layer + 1 else 0.0)

        monkeypatch.setattr("megavit.model.block.attention_weights", moved)
        with model.observe(Recorder()) as recorder:
            return recorder, model(images(1).double())[0, 1]

    recorder, score = moved_score(0.0)
    score.backward()
    found = float((recorder.grads[f"attention {layer}"] * direction).sum())
    ahead, behind = (moved_score(step)[1].item() for step in (1e-5, -1e-5))
    assert found == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


def test_frozen_weights_leave_the_gradients_as_they_are() -> None:
    """Catches tensors that drop out of the graph when nothing in front of them is trained."""
    expected, _ = observed(build())
    freezes = {
        "all": lambda name: True,
        "all but the head": lambda name: not name.startswith("head"),
        "embedding and first block": lambda name: name.startswith(("embed", "blocks.0")),
        "scales": lambda name: name.endswith("_scale") or "norm" in name,
        "matrices": lambda name: name.endswith(("qkv.weight", "up.weight", "out.weight")),
    }
    for policy in ("none", "full", "selective"):
        for what, is_frozen in freezes.items():
            model = build(policy)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_frozen(name))
            found, _ = observed(model)
            assert close(found.grads, expected.grads), (policy, what)
            assert all((p.grad is None) == is_frozen(name) for name, p in model.named_parameters())


def test_observers_nest_and_leave() -> None:
    """Catches an observer that outlives its context, also after an exception of its own, or hides another."""

    class Stop(Exception):
        pass

    class Stopper:
        def tokens(self, layer: int, x: Tensor) -> None:
            if layer == 1:
                raise Stop

    model = build()
    with model.observe(Recorder()) as outer:
        with pytest.raises(Stop), model.observe(Stopper()):
            model(images(2))
        outer.seen.clear()
        with model.observe(Recorder()) as inner:
            model(images(2))
        assert close(outer.seen, inner.seen) and len(inner.seen) == 14
    model(images(2))  # would tell the recorder twice


def test_what_is_not_asked_for_costs_nothing() -> None:
    """Catches the explicit matrix made without need, and fused kernels that are no longer called."""

    class Tokens:
        def __init__(self) -> None:
            self.count = 0

        def tokens(self, layer: int, x: Tensor) -> None:
            self.count += 1

        def queries_keys(self, layer: int, q: Tensor, k: Tensor) -> None:
            self.count += 1

    def uses_fused_kernel(model: MegaVit) -> bool:
        with FlopCounterMode(display=False) as counter:
            model(images(1))
        return any("attention" in str(op) for op in counter.get_flop_counts()["Global"])

    model = build()
    assert uses_fused_kernel(model)
    with model.observe(Tokens()) as observer:
        assert uses_fused_kernel(model)
    assert observer.count == 7
    with model.observe(Recorder()):
        assert not uses_fused_kernel(model)


def test_the_model_keeps_no_matrix() -> None:
    """Catches maps that pile up behind an observer which keeps none, without gradients and, if blocks are
    recomputed, with them."""

    class Counter:
        def __init__(self) -> None:
            self.alive: list[weakref.ref[Tensor]] = []
            self.most = 0

        def attention(self, layer: int, weights: Tensor) -> None:
            self.alive.append(weakref.ref(weights))
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))

    model = build("full", depth=5)
    for wants_gradients in (False, True):
        with torch.set_grad_enabled(wants_gradients), model.observe(Counter()) as counter:
            model(images(1))
        assert len(counter.alive) == 5 and counter.most == 1


def test_bfloat16_and_autocast_agree_with_the_fused_kernel() -> None:
    """Catches scores that are rounded before the softmax, which a fused kernel keeps in float32."""
    for autocast in (False, True):
        model = build().eval()
        x = images(2)
        if not autocast:
            model, x = model.bfloat16(), x.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
            fused = model(x)
            with model.observe(Recorder()) as recorder:
                explicit = model(x)
        assert (fused - explicit).abs().max() < 2**-6 * fused.abs().max()
        maps = {name: t for name, t in recorder.seen.items() if name.startswith(("attention", "pool"))}
        assert len(maps) == 4 and all(t.dtype == torch.float32 for t in maps.values())


def test_compiled_blocks_are_observed_uncompiled() -> None:
    """Catches an observer whose code is traced, or told while compiling only."""
    torch.compiler.reset()
    plain, _ = observed(build())
    model = build()
    compile_with, torch.compile = torch.compile, lambda f: compile_with(f, backend="eager", fullgraph=True)
    try:
        model.compile_blocks()
    finally:
        torch.compile = compile_with
    before = model(images(2))
    for _ in range(2):
        recorder, logits = observed(model)
        assert close(recorder.seen, plain.seen) and close(recorder.grads, plain.grads)
        assert (logits - before).abs().max() < 1e-5 * before.abs().max()


def shard(name: str, value: Tensor, mesh: Mesh) -> Tensor:
    """This rank's heads of what a single process observes."""
    return value if name.startswith("tokens") else value.chunk(mesh.tp_size, 1)[mesh.tp_rank]


def differences_from_single(tp_size: int) -> list[str]:
    mesh, wrong = Mesh.from_environment(tp_size), []
    for name, fields in VARIANTS.items():
        single, logits = observed(build(**fields))
        for policy in ["none", "full"] if name == "sequential" else ["none", "full", "selective"]:
            mine, same = observed(build(policy, mesh, **fields))
            if (logits - same).abs().max() > 1e-5 * logits.abs().max():
                wrong.append(f"{name}, {policy}: logits")
            for what in ("seen", "grads"):
                expected = {key: shard(key, value, mesh) for key, value in getattr(single, what).items()}
                if not close(getattr(mine, what), expected):
                    wrong.append(f"{name}, {policy}: {what}")
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_observe_their_heads_of_a_single_process(tp_size: int) -> None:
    """Catches gradients that lack a sum over ranks, and maps of other heads than the rank's own."""
    assert run_ranks(tp_size, differences_from_single, tp_size) == [[]] * tp_size


def differences_under_zero3(recompute: Any) -> list[str]:
    """What a trained engine's partitioned model tells, against a plain model with its weights; also of images
    of another size, after a step that moved the position embedding."""
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.ds_patches import safe_get_full_fp32_param
    from megavit.train.engine import Engine

    def look(model: torch.nn.Module, height: int, width: int) -> Recorder:
        with model.observe(Recorder()) as recorder:
            logits = model(torch.linspace(-1, 1, height * width).view(1, 1, height, width))
        logits[:, 1].sum().backward()
        return recorder

    run = dataclasses.replace(RUN, recompute=recompute)
    mesh = Mesh.from_environment(1)
    engine = Engine(run, resolve_ds_config(ds_config(3, BATCH // 2), mesh.world_size, "cpu"), mesh)
    plain, wrong = MegaVit.from_config(run.model), []
    for step, sides in enumerate([(8, 8), (12, 4), (12, 4)]):
        engine.train_step(inputs(run, mesh, step, BATCH // 2), torch.tensor(6.0), 3e-2)
        with torch.no_grad():
            for name, mine in plain.named_parameters():
                mine.copy_(safe_get_full_fp32_param(engine.parameters[name]).view(mine.shape))
        expected = look(plain, *sides)
        found = engine.call(lambda module, sides: look(module.trunk, *sides), sides)
        if not expected.grads.keys() == expected.seen.keys() == found.grads.keys():
            wrong.append(f"{recompute}, {step}: {found.grads.keys()}")
        elif not (close(found.seen, expected.seen) and close(found.grads, expected.grads)):
            wrong.append(f"{recompute}, {step}: values")
    return wrong


@pytest.mark.dist
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_partitioned_models_are_observed_too(recompute: str) -> None:
    """Catches ZeRO-3's copies of a module's outputs, which no gradient reaches, and a position embedding that
    is resized from what was gathered before."""
    assert run_ranks(2, differences_under_zero3, recompute) == [[]] * 2
