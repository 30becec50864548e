"""Products in 8-bit floating point, and models that use them, against the plain ones. A CPU rounds as a GPU
does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megavit.model.vit import MegaVit
from megavit.parallel.fp8 import check_device, product
from megavit.parallel.layout import layout_of
from megavit.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.train.runs import ds_config, small_run, steps_of, train_here

SHAPE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "channels": 1,
    "num_classes": 10,
    "dim": 64,
    "depth": 4,
    "heads": 4,
    "mlp_dim": 128,
}


def e4m3(value: float) -> float:
    """The nearest number of 3 bits of mantissa and exponents from -6, halves to even: written down from the
    format's definition."""
    if value == 0:
        return 0.0
    exponent = max(torch.frexp(torch.tensor(abs(value), dtype=torch.float64))[1].item() - 1, -6)
    step = 2.0 ** (exponent - 3)
    return round(value / step) * step


def by_hand(rows: torch.Tensor) -> torch.Tensor:
    """float64 [n, k]: what is left of the rows."""
    scales = (rows.float().abs().amax(1, keepdim=True) / 448).double()
    scaled = (rows.float() / scales.float()).double()
    return torch.tensor([[e4m3(value) for value in row] for row in scaled.tolist()]).double() * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [32, 37])
def test_a_product_is_that_of_the_rounded_factors(dtype: torch.dtype, inner: int) -> None:
    """Catches scales of the wrong axis, a transposed factor that is read as it lies in memory, a size that is
    no multiple of 16, and a bias that is rounded or scaled."""
    torch.manual_seed(0)
    left = (torch.randn(inner, 24) * torch.logspace(-3, 3, 24)).to(dtype).t()  # [24, inner], strided
    right, bias = torch.randn(48, inner).to(dtype), torch.randn(48).to(dtype)
    expected = by_hand(left) @ by_hand(right).t()
    found = product(left, right)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    atol = tolerance * expected.abs().amax(1, keepdim=True)
    assert ((found.double() - expected).abs() <= atol).all()
    assert not torch.allclose(found.double(), left.double() @ right.double().t(), rtol=1e-3)  # it does round
    torch.testing.assert_close(product(left, right, bias), found + bias, rtol=1e-2, atol=float(atol.max()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_poison(poison: float) -> None:
    """Catches saturation that turns an infinite gradient into a large one, so that nothing refuses it."""
    left, right = torch.ones(16, 32), torch.ones(16, 32)
    left[3, 5] = poison
    found = product(left, right)
    assert found[3].isnan().all() and found[:3].isfinite().all()


def step(model: MegaVit, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients by name."""
    model.zero_grad()
    loss = F.cross_entropy(model(images), torch.arange(len(images)) % 10)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def models(**fields: Any) -> tuple[MegaVit, MegaVit]:
    """Of the same weights: plain, and in fp8."""
    torch.manual_seed(0)
    plain = MegaVit(**SHAPE, **fields)
    torch.nn.init.normal_(plain.head.weight, std=0.1)
    with_fp8 = MegaVit(**SHAPE, **fields, matmul="fp8")
    with_fp8.load_state_dict(plain.state_dict())
    return plain, with_fp8


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_gradients_are_near_the_plain_ones(block: str) -> None:
    """Catches a backward pass with a factor left out, and fp8 that is never used, or used in the first or
    last block, whose products must not be rounded."""
    plain, with_fp8 = models(block=block)
    images = torch.randn(5, 1, 8, 8)
    (loss, expected), (found_loss, found) = step(plain, images), step(with_fp8, images)
    assert found_loss != loss
    assert abs(found_loss - loss) < 0.02 * loss
    for name, gradient in expected.items():
        assert F.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0) > 0.99, name
    layers = [name for name, layer in with_fp8.named_modules() if getattr(layer, "fp8", False)]
    assert len(layers) == 8 and all(name.startswith(("blocks.1.", "blocks.2.")) for name in layers)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputation_changes_nothing(policy: str) -> None:
    """Catches scales that differ in the recomputation, and a policy that does not know fp8's product and
    computes it again."""
    results, flops = [], []
    for recompute in ("none", policy):
        _, model = models(recompute=recompute)
        with FlopCounterMode(display=False) as counter:
            results.append(step(model, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))))
        flops.append(counter.get_total_flops())
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    assert policy == "full" or flops[0] == flops[1]


def sharded_distances() -> dict[str, float]:
    """How far this rank's gradients at tp 2 are from its shares of those of one process: 1 - cosine."""
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(2))
    whole, shard = (
        MegaVit(**SHAPE, matmul="fp8", mesh=mesh, seed=3)
        for mesh in (Mesh.single(), Mesh.from_environment(2))
    )
    for model in (whole, shard):
        (model.forward_features(images) * direction).sum().backward()
    distances = {}
    for (name, expected), found in zip(whole.named_parameters(), shard.parameters(), strict=True):
        if expected.grad is not None:
            part = layout_of(found).take(expected.grad, shard.mesh.tp_rank, 2).flatten()
            distances[name] = 1 - float(F.cosine_similarity(part, found.grad.flatten(), dim=0))
    return distances


@pytest.mark.dist
def test_tensor_parallel_gradients_are_as_near() -> None:
    """Catches a sum over ranks that is left out in the fp8 branch. Shards round other rows than the whole
    does, so are not equal."""
    for distances in run_ranks(2, sharded_distances):
        assert len(distances) == 40
        assert max(distances.values()) < 0.01, distances


@pytest.mark.dist
def test_a_run_goes_on_with_and_without(digits: Path, tmp_path: Path) -> None:
    """Catches ZeRO-3 shards that fp8 changes, a saved run bound to fp8, and an export that a machine without
    it could not load."""
    fields = {"model__depth": 3, "max_steps": 8}
    run = small_run(digits, tmp_path, **fields, model__matmul="fp8", stop_at_step=5, tensor_parallel_size=2)
    assert run_ranks(4, train_here, run, ds_config(3)) == [""] * 4
    run = small_run(digits, tmp_path, **fields)
    assert run_ranks(1, train_here, run, ds_config(1)) == [""]
    assert [row["step"] for row in steps_of(tmp_path)] == list(range(1, 9))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["matmul"] == "default"


@pytest.mark.slow
def test_thirty_steps_learn_as_the_plain_model_in_bfloat16_does() -> None:
    """Catches gradients that are biased by rounding: the losses would drift apart."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    images = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    ends = []
    for model in models():
        model.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
        generator, losses = torch.Generator().manual_seed(0), []
        for _ in range(30):
            chosen = torch.randint(len(images), (24,), generator=generator)
            loss = F.cross_entropy(model(images[chosen].bfloat16()).float(), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append(sum(losses[-10:]) / 10)
        assert ends[-1] < 0.8 * losses[0]
    assert abs(ends[1] - ends[0]) < 0.15 * ends[0] + 0.05, ends


def test_what_cannot_run_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of a kernel, minutes after the start, in place of one that names the flag."""
    with pytest.raises(ValueError, match=r"model.depth is 2"):
        MegaVit(**SHAPE | {"depth": 2}, matmul="fp8")
    with pytest.raises(ValueError, match=r"share of model.dim 72 is 72"):
        MegaVit(**SHAPE | {"dim": 72}, matmul="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8.9 .* NVIDIA A100 has 8.0; leave it out"):
        check_device(torch.device("cuda"), bf16=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"--ds.bf16.enabled true"):
        check_device(torch.device("cuda"), bf16=False)
    check_device(torch.device("cuda"), bf16=True)
    check_device(torch.device("cpu"), bf16=False)
