"""fp8 against bfloat16: a block's four matmuls with the casts that fp8 needs, whole blocks, and what a model
learns in the same steps. Blocks and model take the option `ModelConfig.matmul`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.bench.gpu.block import Way, make_blocks, step_of
from megavit.bench.gpu.matmul import PASSES, fp8_product, layers, product_of, require_fp8
from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case
from megavit.bench.report import Row
from megavit.bench.rounds import kernel_s, median_s
from megavit.model.config import ModelConfig
from megavit.model.count import trunk_flops_per_token
from megavit.model.vit import MegaVit
from megavit.parallel.fp8 import rounded

_LR = 3e-4
_TAIL = 0.1  # of the steps, whose mean loss is compared


def cases(setting: Setting) -> Iterator[Case]:
    times: dict[str, float] = {}  # ms of the same work in bfloat16
    losses: dict[str, float] = {}
    for dtype in ("bfloat16", "fp8"):
        names = {"work": "blocks", "dtype": dtype, "compiled": True}
        yield Case(names, partial(_blocks, setting, dtype, True, times))
    for name, (fan_in, fan_out) in layers(setting.block).items():
        for which in PASSES:
            names = {"work": name, "pass": which}
            rows = setting.micro_batches[0] * setting.block.num_tokens
            yield Case(names, partial(_product, setting, *product_of(rows, fan_in, fan_out, which)))
    # What another order of the images alone would change says what a difference means.
    for dtype, seed in (("bfloat16", 0), ("bfloat16", 1), ("fp8", 0)):
        work = f"{setting.learner_steps} steps of {setting.learner.name}"
        yield Case(
            {"work": work, "dtype": dtype, "seed": seed}, partial(_learn, setting, dtype, seed, losses)
        )
    for dtype in ("bfloat16", "fp8"):
        names = {"work": "blocks", "dtype": dtype, "compiled": False}
        yield Case(names, partial(_blocks, setting, dtype, False, times))


def _in(config: ModelConfig, dtype: str, setting: Setting) -> ModelConfig:
    """The architecture with its matmuls in `dtype`. Unavailable where the library or the GPU has no fp8."""
    if dtype != "fp8":
        return config
    require_fp8(setting)
    return dataclasses.replace(config, matmul="fp8")


def _product(setting: Setting, m: int, n: int, k: int) -> Row:
    """[M, K] x [K, N] in bfloat16, in fp8 with a scale a row, and the casts of both operands to it."""
    a, b = (torch.randn(size, k, device=setting.device, dtype=setting.dtype) for size in (m, n))
    call = fp8_product(setting, m, n, k, by_row=True)

    def cast() -> None:
        rounded(a)
        rounded(b)

    bf16, fp8, casts = (
        kernel_s(one, setting.kernel_s, setting.device) * 1e3 for one in (lambda: a @ b.t(), call, cast)
    )
    return {
        "M": m,
        "N": n,
        "K": k,
        "bf16_ms": bf16,
        "fp8_ms": fp8,
        "eager_casts_ms": casts,
        "speedup": bf16 / fp8,
        "speedup_with_eager_casts": bf16 / (fp8 + casts),
    }


def _blocks(setting: Setting, dtype: str, compiled: bool, times: dict[str, float]) -> Row:
    config, batch = _in(setting.block, dtype, setting), setting.micro_batches[0]
    step = step_of(*make_blocks(setting, config, Way(batch, compiled=compiled)))
    seconds = median_s(step, setting.steps, setting.device)
    rate = trunk_flops_per_token(config) * batch * config.num_tokens / seconds
    key = str(compiled)
    if dtype == "bfloat16":
        times[key] = seconds
    return {
        "micro_batch": batch,
        "ms": seconds * 1e3,
        "tflop_per_s": rate / 1e12,
        "of_bf16_peak": setting.of_peak(rate),
        "speedup": times[key] / seconds if key in times else None,
    }


def _learn(setting: Setting, dtype: str, seed: int, losses: dict[str, float]) -> Row:
    """The loss of a classifier of noisy prototypes. Weights are bfloat16 copies of float32 ones, as under
    ZeRO."""
    config = _in(setting.learner, dtype, setting)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = MegaVit.from_config(config).to(setting.dtype)
        prototypes = torch.randn(config.num_classes, config.channels, 8, 8)
    weights: list[Tensor] = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=_LR, fused=True)
    generator = torch.Generator(setting.device).manual_seed(seed)
    found: list[Tensor] = []
    for number in range(setting.learner_steps):
        images, labels = _batch(setting, config, prototypes, generator)
        loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        found.append(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, 10 * (number + 1) / setting.learner_steps)
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
    values = [float(loss) for loss in found]
    last = statistics.mean(values[-max(1, int(_TAIL * len(values))) :])
    if dtype == "bfloat16" and seed == 0:
        losses["bfloat16"] = last
    base = losses.get("bfloat16")
    quarters = {f"loss_{quarter}/4": values[len(values) * quarter // 4 - 1] for quarter in (1, 2, 3)}
    return {
        "loss_0": values[0],
        **quarters,
        "loss_last_tenth": last,
        "less_bfloat16": None if base is None else last - base,
    }


def _batch(
    setting: Setting, config: ModelConfig, prototypes: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    size, side = setting.learner_batch, config.image_size
    labels = torch.randint(config.num_classes, (size,), device=setting.device, generator=generator)
    images = F.interpolate(prototypes[labels], size=(side, side))
    noise = torch.randn(images.shape, device=setting.device, generator=generator)
    return (images + 2 * noise).to(setting.dtype), labels
