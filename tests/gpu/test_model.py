"""The model in bfloat16 on a GPU against float32 on a CPU: losses, recomputation, kernels, memory, compiled
blocks. Nothing here needs DeepSpeed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from megavit.bench.counters import memory_of_step
from megavit.model.block import make_block
from megavit.model.config import ModelConfig
from megavit.model.frozen import Frozen
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from tests.gpu.devices import POLICIES, SMALL, close, on_both, pictures, small_model

STEPS, BATCH = 10, 8
BF16 = torch.bfloat16


def losses(device: str, dtype: torch.dtype) -> list[float]:
    """Ten steps with float32 master weights, as ZeRO keeps them, and a model of `dtype`."""
    model, found = small_model(device, dtype), []
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-4, fused=True)
    for step in range(STEPS):
        images, labels = pictures(BATCH, device, step % 2)
        loss = F.cross_entropy(model(images.to(dtype)), labels)
        model.zero_grad()
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        found.append(loss.detach())
    return torch.stack(found).tolist()


@on_both
def test_ten_steps_in_bfloat16_follow_float32(device: str) -> None:
    """Catches kernels that compute something else than the CPU's: the losses come apart at once."""
    expected = losses("cpu", torch.float32)
    assert losses(device, BF16) == pytest.approx(expected, abs=0.1)  # they fall from 2.2 to 0.1
    assert losses(device, torch.float32) == pytest.approx(expected, abs=0.02)  # sums in another order
    assert expected[-1] < 0.8 * expected[0]


def gradients(model: MegaVit, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    images, labels = pictures(BATCH, device)
    loss = F.cross_entropy(model(images.to(dtype)), labels)
    model.zero_grad()
    loss.backward()
    found = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    return found | {"loss": loss.detach()}


@on_both
def test_recompute_policies_are_equal(device: str) -> None:
    """Catches activations that come out otherwise when they are computed again. The backward pass of flash
    attention adds in no fixed order, hence a little room."""
    expected = gradients(small_model(device, BF16), device, BF16)
    for policy in POLICIES[1:]:
        found = gradients(small_model(device, BF16, policy), device, BF16)
        assert torch.equal(found["loss"], expected["loss"]), policy
        assert [n for n in expected if not close(found[n], expected[n], 2e-2)] == [], policy


def attention_calls(device: str, policy: str, head_dim: int, tokens: int) -> Counter[str]:
    """Forward attention operators of one block's forward and backward pass, and their kernels on a GPU."""
    config = ModelConfig(dim=2 * head_dim, num_heads=2, mlp_dim=4 * head_dim, depth=1)
    block = make_block(config, Initializer(0, Mesh.single()), policy).to(device, BF16)  # type: ignore[arg-type]
    x = torch.randn(2, tokens, 2 * head_dim, device=device, dtype=BF16, requires_grad=True)
    block(x).sum().backward()  # what is looked up or compiled once
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        block(x).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.events():
        is_backward = "backward" in event.name.lower() or "bwd" in event.name.lower()
        is_operator = event.name.startswith("aten::_scaled_dot_product") and _allocates(event)
        if not is_backward and (is_operator or any(part in event.name for part in _KERNELS)):
            found[event.name] += 1
    return found


_KERNELS = ("flash_fwd", "fmha", "sdpa_fprop", "sdpa_sm")


def _allocates(event: Any) -> bool:
    """Whether an operator computes, by itself: not one that a mode of Python's looks at first and passes on,
    nor one that selective recomputation serves from its store."""
    own = [child for child in event.cpu_children if child.name not in (event.name, "PythonDispatchMode")]
    return any(child.name.startswith("aten::empty") or _allocates(child) for child in own)


@pytest.mark.parametrize(
    ("device", "head_dim", "tokens"),
    [
        ("cpu", 64, 257),
        *(
            pytest.param("cuda", *sizes, marks=pytest.mark.gpu)
            for sizes in [(64, 256), (64, 257), (80, 50), (88, 197), (96, 256), (104, 256), (128, 257)]
        ),
    ],
)
def test_a_fused_kernel_does_the_attention(device: str, head_dim: int, tokens: int) -> None:
    """Catches attention through a matrix of scores, and a kernel that selective recomputation does not know
    and so computes twice."""
    for policy, times in (("none", 1), ("selective", 1), ("full", 2)):
        found = attention_calls(device, policy, head_dim, tokens)
        operators = {name: n for name, n in found.items() if name.startswith("aten::_scaled_dot_product_")}
        (name,) = operators
        assert operators[name] == times, (policy, found)
        if device == "cuda":
            assert name in ("aten::_scaled_dot_product_flash_attention", _CUDNN), found
            kernels = [kernel for kernel in found if not kernel.startswith("aten::")]
            assert sum(found[kernel] for kernel in kernels) == times, (policy, found)


_CUDNN = "aten::_scaled_dot_product_cudnn_attention"


@on_both
def test_activations_kept_for_backward(device: str) -> None:
    """Catches memory that a kernel keeps unasked: 16, 9 and 1 D a token and block are what plans rest on."""
    batch, tokens, dim, depth = 4, 256, 256, 4
    config = ModelConfig(dim=dim, num_heads=4, mlp_dim=4 * dim, depth=1)
    for policy, expected in zip(POLICIES, (16, 9, 1), strict=True):
        init = Initializer(0, Mesh.single())
        blocks = torch.nn.Sequential(*(make_block(config, init, policy) for _ in range(depth)))  # type: ignore
        blocks.to(device, BF16)
        x = torch.randn(batch, tokens, dim, device=device, dtype=BF16, requires_grad=True)

        def forward(blocks: Any = blocks, x: torch.Tensor = x) -> torch.Tensor:
            return blocks(x).sum()

        def clear(blocks: Any = blocks, x: torch.Tensor = x) -> None:
            blocks.zero_grad(set_to_none=False)
            x.grad = None

        kept = memory_of_step(forward, clear).kept / (batch * tokens * dim * depth * BF16.itemsize)
        # A CPU's norms of bfloat16 keep one number a row more, and the output lives while it is summed.
        assert expected - 1.1 < kept < expected + 0.9, (policy, kept)


@on_both
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks_are_one_graph_and_stay_it(device: str, policy: str) -> None:
    """Catches a block that is left to Python in part, and one that is compiled again in later steps."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    config = ModelConfig(dim=128, num_heads=2, mlp_dim=512, depth=1)
    init = Initializer(0, Mesh.single())
    blocks = [make_block(config, init.scope(i), policy).to(device, BF16) for i in range(2)]  # type: ignore[arg-type]
    torch.compiler.reset()
    found = torch._dynamo.explain(blocks[0].forward)(torch.randn(2, 50, 128, device=device, dtype=BF16))
    assert found.graph_break_count == 0, found.break_reasons
    torch.compiler.reset()
    x = torch.randn(2, 50, 128, device=device, dtype=BF16)
    expected = blocks[1](blocks[0](x))
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)  # type: ignore

    def step() -> torch.Tensor:
        given = x.clone().requires_grad_()
        y = blocks[1](blocks[0](given))
        y.float().square().mean().backward()
        assert given.grad is not None and bool(given.grad.isfinite().all())
        return y

    assert close(step(), expected, 3e-2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            step()
    torch.compiler.reset()


@on_both
def test_the_classifier_is_float32(device: str) -> None:
    """Catches logits of three digits, with which 30,000 classes cannot be told apart."""
    model = small_model(device, BF16)
    images, _ = pictures(2, device)
    logits = model(images.to(BF16))
    assert logits.dtype == torch.float32
    assert model.head is not None and not torch.equal(logits, logits.bfloat16().float())
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images.to(BF16)), pre_logits=True)
        assert pooled.dtype == torch.float32 and close(model.classify(pooled), logits, 1e-5)


@on_both
def test_frozen_parts_and_frozen_statistics(device: str) -> None:
    """Catches gradients of frozen weights, and fused kernels that do not take part in frozen statistics."""
    model = small_model(device, BF16)
    for part in (model.embed, model.blocks):
        part.requires_grad_(False)
    found = gradients(model, device, BF16)
    assert {name.split(".")[0] for name in found} == {"norm", "pool", "head", "loss"}
    assert isinstance(Frozen(), Frozen)
    images, _ = pictures(2, device)
    with model.frozen_statistics():
        assert close(model(images.to(BF16)), model(images.to(BF16)), 1e-6)


@on_both
def test_an_observer_sees_what_the_fused_kernel_computes(device: str) -> None:
    """Catches an explicit attention that differs from the fused one, on odd numbers of tokens."""

    class Weights:
        def __init__(self) -> None:
            self.found: list[torch.Tensor] = []

        def attention(self, layer: int, weights: torch.Tensor) -> None:
            self.found.append(weights)

    model, observer = small_model(device, BF16).eval(), Weights()
    images, _ = pictures(2, device)
    with torch.no_grad():
        plain = model(images.to(BF16))
        with model.observe(observer):
            observed = model(images.to(BF16))
    assert [tuple(w.shape) for w in observer.found] == [(2, 2, 25, 25)] * SMALL.depth
    assert all(bool((w.sum(-1) - 1).abs().max() < 1e-3) for w in observer.found)
    assert close(observed, plain, 3e-2)
