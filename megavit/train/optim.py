"""The optimizer's parameter groups: which weights decay and by how much, how fast each learns, which are
frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megavit.fields import nearest
from megavit.model.block import ParallelBlock, SequentialBlock
from megavit.parallel.layout import layout_of
from megavit.tasks.task import Task


def optimizer_groups(
    task: Task, parameters: Mapping[str, nn.Parameter], weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW groups of those parameters, by logical name, that are not frozen. `lr_factor` of a group is what
    its learning rate is multiplied by: the task's factor, times `layer_decay` for every layer above.

    Logical shapes decide what is a matrix, since ZeRO-3 flattens the real ones.
    """
    groups: dict[str, dict[str, Any]] = {}
    depth = task.model.depth
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        group = task.group(name, layout_of(parameter).shape, weight_decay)
        label, factor = group.name, group.lr_factor
        if layer_decay != 1.0:
            layer = layer_number(name, depth)
            label, factor = f"{label} of layer {layer}", factor * layer_decay ** (depth + 1 - layer)
        entry = {"name": label, "params": [], "weight_decay": group.weight_decay, "lr_factor": factor}
        groups.setdefault(label, entry)["params"].append(parameter)
    # What decays comes first, as in runs that were saved before there were other groups.
    return sorted(groups.values(), key=lambda entry: entry["weight_decay"] == 0.0)


def layer_number(name: str, depth: int) -> int:
    """The layer that a parameter counts to, with timm's numbering: 0 is the embedding, then one number a
    block; the last norm counts to the last block; depth + 1 is what comes after (pooling, heads)."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if name == "prefix" or name.startswith("embed."):
        return 0
    return depth if name.startswith("norm.") else depth + 1


def freeze(module: nn.Module, names: str) -> None:
    """Take the modules or parameters `names`, separated by commas, out of training. ValueError, with the
    nearest name, for one that the root module of the task does not have, and if nothing is left to train."""
    parts = {path: list(part.parameters()) for path, part in module.named_modules()}
    parts |= {path: [parameter] for path, parameter in module.named_parameters()}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name not in parts or name == "":
            raise ValueError(f"--freeze {name}: there is no such module{nearest(name, parts)}")
        for parameter in parts[name]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"--freeze {names} leaves nothing to train; leave a module out of it")


def keep_until_backward(module: nn.Module) -> None:
    """Let what follows frozen modules compute the gradient of its input too. Of a module none of whose inputs
    has a gradient DeepSpeed takes the weights away as soon as the gradient of its output is there, before
    they are used."""

    def require_grad(part: nn.Module, arguments: tuple[Any, ...]) -> Any:
        tensors = [item for item in arguments if isinstance(item, Tensor) and item.is_floating_point()]
        if not tensors or not torch.is_grad_enabled() or any(item.requires_grad for item in tensors):
            return None
        first = tensors[0]
        return tuple(item.detach().requires_grad_() if item is first else item for item in arguments)

    for part in module.modules():
        is_block = isinstance(part, ParallelBlock | SequentialBlock)
        own = part.parameters(recurse=is_block)
        if any(parameter.requires_grad for parameter in own):
            part.register_forward_pre_hook(require_grad)


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The modules with parameters none of which is trained. They run in evaluation mode: dropout would only
    add noise to what is constant, and running statistics would move."""
    return [
        part
        for part in module.modules()
        if (own := list(part.parameters())) and not any(parameter.requires_grad for parameter in own)
    ]
