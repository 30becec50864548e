"""ViT-22B whole, on one GPU.

A GPU of 80 GB holds its bfloat16 weights (44.8 GB) and activations, but not all gradients as well, and no
optimizer's states. So each gradient moves its weight as soon as it is there, by plain gradient descent, and
goes: forward, backward and update at full size, without communication.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.bench.gpu.block import KEPT
from megavit.bench.gpu.setting import Setting
from megavit.bench.gpu.stage import Case, Unavailable
from megavit.bench.report import Row
from megavit.bench.rounds import median_s
from megavit.model.config import ModelConfig, Recompute
from megavit.model.count import block_matrices, num_params, train_flops, trunk_flops_per_token
from megavit.model.vit import MegaVit

_LR = 1e-6
_MARGIN = 3e9  # bytes: cuBLAS's workspaces, fragments, what the display or another process has
_STEPS = 4  # that are timed: one takes seconds


def cases(setting: Setting) -> Iterator[Case]:
    model = functools.cache(partial(_build, setting))
    first, *others = setting.whole_batches
    ways: list[tuple[Recompute, int]] = [("selective", first), ("none", others[0] if others else first)]
    ways += [("selective", batch) for batch in others] + [("full", setting.whole_batches[-1])]
    for recompute, batch in ways:
        names = {"model": setting.whole.name, "recompute": recompute, "micro_batch": batch}
        yield Case(names, partial(_step, setting, model, recompute, batch))


def needed_bytes(config: ModelConfig, recompute: Recompute, batch: int, itemsize: int) -> int:
    """Of weights, activations kept for backward, and one block's working set and gradients. By arithmetic."""
    stream = batch * config.num_tokens * config.dim * itemsize
    working_set = (KEPT["none"] - KEPT[recompute] + 10) * stream
    one_block = block_matrices(config) // config.depth * itemsize
    weights = num_params(config) * itemsize
    return weights + KEPT[recompute] * stream * config.depth + working_set + 2 * one_block


def _build(setting: Setting) -> MegaVit:
    """With random weights, made in the dtype: in float32 first they would not fit."""
    config, before = setting.whole, torch.get_default_dtype()
    require_memory(setting, num_params(config) * setting.dtype.itemsize, "the weights alone")
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            model = MegaVit.from_config(config, deferred_init=True)
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        is_scale = weight.ndim == 1 and "bias" not in name
        nn.init.normal_(weight, mean=float(is_scale), std=0.5 * config.dim**-0.5)
        weight.register_post_accumulate_grad_hook(_descend)
    return model


def _descend(weight: Tensor) -> None:
    assert weight.grad is not None
    # Its version stays: a recomputed block may ask for the weight once more.
    weight.data.sub_(weight.grad, alpha=_LR)
    weight.grad = None


def _step(setting: Setting, model: Callable[[], MegaVit], recompute: Recompute, batch: int) -> Row:
    config, on_gpu = setting.whole, setting.device == "cuda"
    whole = model()
    needed = needed_bytes(config, recompute, batch, setting.dtype.itemsize)
    require_memory(setting, needed - num_params(config) * setting.dtype.itemsize, "what comes on top")
    torch.compiler.reset()
    for block in whole.blocks:
        block.recompute = recompute  # type: ignore[assignment]
        block.__dict__.pop("forward", None)  # compiled for another policy
        block.forward = torch.compile(block.forward, backend=setting.compiler)
    side = config.image_size
    with torch.device(setting.device):
        images = torch.rand(batch, config.channels, side, side, dtype=setting.dtype) * 2 - 1
        targets = F.one_hot(torch.randint(0, config.num_classes, (batch,)), config.num_classes).float()
    losses: list[float] = []

    def step() -> None:
        loss = F.binary_cross_entropy_with_logits(whole(images), targets, reduction="sum") / batch
        loss.backward()
        losses.append(loss.item())

    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = median_s(step, min(_STEPS, setting.steps), setting.device)
    rate = batch * train_flops(config) / seconds
    papers = batch * config.num_tokens * trunk_flops_per_token(config) / seconds
    return {
        "ms": seconds * 1e3,
        "images_per_s": batch / seconds,
        "tflop_per_s": rate / 1e12,
        "mfu": setting.of_peak(rate),
        "mfu_of_trunk": setting.of_peak(papers),  # as the paper counts: neither head nor embedding
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "expected_peak_gib": needed / 2**30,
        "loss": losses[-1],
    }


def require_memory(setting: Setting, needed: float, what: str) -> None:
    """Unavailable if the GPU has less free memory."""
    if setting.device != "cuda":
        return
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if needed + _MARGIN > free:
        raise Unavailable(
            f"does not fit: {what} takes {needed / 1e9:.1f} GB and {_MARGIN / 1e9:g} GB stay free, and "
            f"{free / 1e9:.1f} GB are"
        )
