"""Maps over patches against what defines them, spelled out, on every kind of model."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor

from megavit import MegaVit
from megavit.explain.attention import raw_attention, rollout
from megavit.explain.gradient import frozen, integrated_gradients, sum_check
from megavit.explain.methods import METHODS, compute_maps
from megavit.explain.occlusion import occlusion
from megavit.explain.relevance import located, relevance
from megavit.explain.target import Target
from tests.model.test_observe import VARIANTS, build
from tests.model.test_vit import SMALL
from tests.ranks import run_ranks

GRID = (3, 5)


def photos(count: int) -> Tensor:
    """Of another size than the model's, and not square: [count, 3, 12, 20], 3 x 5 patches."""
    return torch.rand(count, 3, 12, 20, generator=torch.Generator().manual_seed(6)) * 2 - 1


def target(count: int) -> Target:
    return Target(torch.arange(1, count + 1), torch.arange(count))


@pytest.fixture(params=[*VARIANTS, "mean"])
def model(request: pytest.FixtureRequest) -> MegaVit:
    return build(**VARIANTS.get(request.param, {"pool": "mean", "num_registers": 1})).eval()


class Keeper:
    """Everything, of one pass."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        self.pooling: Tensor | None = None

    def tokens(self, layer: int, x: Tensor) -> None:
        if layer == -1:
            self.embedding = x

    def attention(self, layer: int, weights: Tensor) -> None:
        self.maps.append(weights)

    def pool(self, weights: Tensor) -> None:
        self.pooling = weights


def first_row(model: MegaVit, pooling: Tensor | None, count: int) -> Tensor:
    """[count, N]: what the pooled feature takes of each token. `pooling` [B, patches] is the MAP head's."""
    prefix = model.config.num_prefix_tokens
    row = torch.zeros(count, prefix + 15)
    if model.config.pool == "cls":
        row[:, model.config.num_registers] = 1
    else:
        row[:, prefix:] = 1 / 15 if pooling is None else pooling
    return row


def test_frozen_is_the_gradient_of_tokens_times_their_difference_from_the_baseline(model: MegaVit) -> None:
    """Catches sums over wrong pixels, rows for columns, and a baseline that is not the image's."""
    baseline = photos(3).flip(0)[:2] / 2
    found = frozen(model, photos(2), target(2), baseline=baseline)
    with model.observe(Keeper()) as start, torch.no_grad():
        model(baseline)
    with model.frozen_statistics(halve_attention=True), model.observe(Keeper()) as seen:
        score = target(2).score(model(photos(2))).sum()
    (gradient,) = torch.autograd.grad(score, seen.embedding)
    expected = (gradient * (seen.embedding - start.embedding)).sum(-1)[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(found, expected.view(2, *GRID), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32 and found.shape == (2, *GRID)


def product_of_matrices(model: MegaVit) -> Tensor:
    """Relevance of two photos as whole matrices, in whatever mode the model is."""
    with model.observe(Keeper()) as seen:
        score = target(2).score(model(photos(2))).sum()
    tensors = seen.maps + ([] if seen.pooling is None else [seen.pooling])
    positive = [
        (weights * grad).clamp(min=0).mean(1)
        for weights, grad in zip(tensors, torch.autograd.grad(score, tensors), strict=True)
    ]
    pooling = None if seen.pooling is None else positive.pop()
    product = torch.eye(positive[0].shape[-1])
    for matrix in positive:
        rows = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-30)
        product = 0.5 * product + 0.5 * rows @ product
    row = first_row(model, None if pooling is None else pooling / pooling.sum(-1, keepdim=True), 2)
    return (row[:, None] @ product)[:, 0, model.config.num_prefix_tokens :].view(2, *GRID)


def test_relevance_is_a_product_of_matrices(model: MegaVit) -> None:
    """Catches blocks in the wrong order, heads or rows that are not normalised, registers among the patches,
    and gradients of a layer with another layer's attention."""
    found = relevance(model, photos(2), target(2))
    torch.testing.assert_close(found, product_of_matrices(model), rtol=1e-4, atol=1e-7)


def test_located_is_relevance_times_smoothed_evidence(model: MegaVit) -> None:
    """Catches two passes in different modes, evidence against the target, and means over the image's edge."""
    with model.frozen_statistics(halve_attention=True):
        share = product_of_matrices(model)
    evidence, expected = frozen(model, photos(2), target(2)), torch.zeros(2, *GRID)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            near = evidence[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            expected[:, row, column] = share[:, row, column] * near.mean((1, 2)).clamp(min=0)
    assert (expected > 0).any()
    torch.testing.assert_close(located(model, photos(2), target(2)), expected, rtol=1e-3, atol=1e-7)


def test_attention_alone_is_a_product_of_matrices(model: MegaVit) -> None:
    """Catches a rollout in the wrong order, or one that leaves the pooling out."""
    with model.observe(Keeper()) as seen, torch.no_grad():
        model(photos(2))
    row = first_row(model, None if seen.pooling is None else seen.pooling.mean(1), 2)
    product = row[:, None]
    for weights in reversed(seen.maps):
        product = 0.5 * product + 0.5 * product @ weights.mean(1)
    raw = row if model.config.pool == "map" else (row[:, None] @ seen.maps[-1].mean(1))[:, 0]
    for found, expected in ((rollout, product[:, 0]), (raw_attention, raw)):
        patches = expected[:, model.config.num_prefix_tokens :].view(2, *GRID)
        torch.testing.assert_close(found(model, photos(2)), patches, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window", [1, 3])
def test_occlusion_covers_every_window_once(window: int) -> None:
    """Catches places that are left out, scores of another image of the batch, and a mean over too few."""
    model, images = build().eval(), photos(2)
    baseline = photos(4)[2:]
    total, covers = torch.zeros(2, *GRID), torch.zeros(GRID)
    with torch.no_grad():
        whole = target(2).score(model(images))
        for row in range(GRID[0] - window + 1):
            for column in range(GRID[1] - window + 1):
                covered, (y, x, side) = images.clone(), (4 * row, 4 * column, 4 * window)
                covered[:, :, y : y + side, x : x + side] = baseline[:, :, y : y + side, x : x + side]
                fall = whole - target(2).score(model(covered))
                total[:, row : row + window, column : column + window] += fall[:, None, None]
                covers[row : row + window, column : column + window] += 1
    for at_once in (1, 4, 100):
        found = occlusion(model, images, target(2), baseline=baseline, window=window, at_once=at_once)
        torch.testing.assert_close(found, total / covers, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_add_up() -> None:
    """Catches steps off the straight way, or of unequal weight; and a sum check that always holds."""
    model = build().double().eval()
    images = photos(2).double()

    def residual(steps: int) -> Tensor:
        values = integrated_gradients(model, images, target(2), steps=steps)
        check = sum_check(model, images, target(2), values)
        return (check.residual / check.difference).abs()

    assert residual(64).max() < 1e-3 < residual(1).max()
    plain = frozen(model, images, target(2))
    check = sum_check(model, images, target(2), plain)
    torch.testing.assert_close(check.total + check.residual, check.difference)
    assert (check.residual / check.difference).abs().max() > 1e-3


def test_a_class_against_another_is_the_difference() -> None:
    """Catches classes the wrong way round, or one of them left out."""
    model = build().eval()
    mine, other = torch.tensor([1, 4]), torch.tensor([3, 0])
    for method in (frozen, integrated_gradients, occlusion):
        found = method(model, photos(2), Target(mine, other))
        expected = method(model, photos(2), Target(mine)) - method(model, photos(2), Target(other))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recompute_policy_has_the_same_maps(name: str) -> None:
    """Catches hooks that see another pass, and blocks recomputed without the mode."""
    expected = compute_maps(build(**VARIANTS[name]).eval(), photos(2), target(2), list(METHODS))
    for policy in ["full"] if name == "sequential" else ["full", "selective"]:
        found = compute_maps(build(policy, **VARIANTS[name]).eval(), photos(2), target(2), list(METHODS))
        for method, values in expected.items():
            torch.testing.assert_close(found[method], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_left_as_it_was(method: str) -> None:
    """Catches gradients left in weights, weights that are no longer trained, hooks and modes that stay, and
    maps that change with no_grad or with a batch of none."""
    model = build().eval()
    model.embed.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    logits = model(photos(2)).detach()
    images = photos(2)
    (expected,) = compute_maps(model, images, target(2), [method]).values()
    with torch.no_grad():
        (found,) = compute_maps(model, images, target(2), [method]).values()
    assert torch.equal(found, expected) and not found.requires_grad and not images.requires_grad
    assert found.dtype == torch.float32
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(photos(2)), logits) and not model._observers
    none = Target(torch.empty(0, dtype=torch.int64))
    (empty,) = compute_maps(model, photos(0), none, [method]).values()
    assert empty.shape == (0, *GRID)
    (first,) = compute_maps(model, photos(1), target(1), [method]).values()
    torch.testing.assert_close(first, expected[:1], rtol=1e-4, atol=1e-6)


def test_relevance_holds_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches maps of all layers that wait for the backward pass, where blocks are recomputed."""
    import megavit.explain.relevance as module

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counter(module._Relevance):
        def attention(self, layer: int, weights: Tensor) -> None:
            super().attention(layer, weights)
            self.count(weights)

        def _pass_back(self, layer: int, grad: Tensor) -> None:
            super()._pass_back(layer, grad)
            self.count(grad)

        def count(self, tensor: Tensor) -> None:
            nonlocal most
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(module, "_Relevance", Counter)
    relevance(build("full", depth=5).eval(), photos(1), target(1))
    assert len(alive) == 10 and most == 1


def test_bfloat16_maps_are_near_those_in_float32() -> None:
    """Catches maps summed in bfloat16, and images that do not meet the model's dtype."""
    exact = compute_maps(build().eval(), photos(2), target(2), list(METHODS))
    rounded = compute_maps(build().eval().bfloat16(), photos(2), target(2), list(METHODS))
    for name, values in rounded.items():
        assert values.dtype == torch.float32
        assert (values - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_what_cannot_be_explained_is_refused() -> None:
    """Catches errors from deep inside, and maps that are noise."""
    with pytest.raises(ValueError, match="model.eval()"):
        frozen(build(), photos(1), target(1))
    with pytest.raises(ValueError, match="num_classes=0"):
        rollout(MegaVit(**(SMALL | {"num_classes": 0})).eval(), photos(1))
    with pytest.raises(ValueError, match="no method is called 'lrp'; there are located, frozen"):
        compute_maps(build().eval(), photos(1), target(1), ["lrp"])
    with pytest.raises(ValueError, match="do not fit this model"):
        occlusion(build().eval(), photos(1)[:, :, :10], target(1))


QUICK = [name for name in METHODS if not name.startswith(("occlusion", "integrated"))]  # a pass or two


def differences_from_single(tp_size: int, methods: list[str]) -> list[str]:
    """The methods' maps through the ZeRO-3 engine, against a single process with its weights."""
    from megavit.parallel.mesh import Mesh
    from megavit.train.ds_config import resolve_ds_config
    from megavit.train.engine import Engine
    from tests.train.test_engine import RUN, WEIGHTS, ds_config, inputs
    from tests.train.test_looking import LR, SIZES, batches, single_process

    def maps_of(trunk: MegaVit, images: Tensor) -> dict[str, Tensor]:
        classes = Target(torch.arange(len(images)) % 7, (torch.arange(len(images)) + 3) % 7)
        return compute_maps(trunk, images, classes, methods)

    mesh, wrong = Mesh.from_environment(tp_size), []
    model = dataclasses.replace(RUN.model, **SIZES)
    run = dataclasses.replace(RUN, tensor_parallel_size=tp_size, model=model, recompute="full")
    raw = ds_config(3, micro_batch=8 // mesh.dp_size)
    engine = Engine(run, resolve_ds_config(raw, mesh.dp_size, "cpu"), mesh)
    for step in range(3):
        engine.train_step(inputs(run, mesh, step, engine.micro_batch), WEIGHTS.sum(), LR)
    plain = single_process(engine)
    for images in batches(mesh):
        found = engine.call(lambda module, x: maps_of(module.trunk, x), images)
        if not len(images):
            continue
        scale = float(plain(images).abs().max())
        for name, expected in maps_of(plain, images).items():
            # Occlusion is a difference of float32 scores, and no more exact than they are.
            limit = 1e-5 * (scale if name.startswith("occlusion") else float(expected.abs().max()))
            error = float((found[name] - expected).abs().max())
            if not error <= limit:
                wrong.append(f"{name}: off by {error}, more than {limit}")
    return wrong


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tp_size", "methods"), [(1, 1, QUICK), (2, 2, QUICK), (4, 2, list(METHODS)), (3, 3, QUICK)]
)
def test_sharded_maps_are_those_of_a_single_process(ranks: int, tp_size: int, methods: list[str]) -> None:
    """Catches heads that are left out, gradients without the other ranks' shares, and ranks that call the
    model more often than others."""
    assert run_ranks(ranks, differences_from_single, tp_size, methods) == [[]] * ranks
