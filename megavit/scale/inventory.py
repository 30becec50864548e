"""What one TP rank's model consists of, as DeepSpeed's ZeRO-3 sees it: modules, in the order they run, with
the sizes of their parameters. Read off the production model, built without memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from megavit.model.block import ParallelBlock, SequentialBlock
from megavit.model.config import ModelConfig
from megavit.model.vit import MegaVit
from megavit.parallel.mesh import Mesh


@dataclass(frozen=True)
class Unit:
    """A module that ZeRO-3 fetches for: the local sizes, in elements, of its own parameters, or, for a block,
    which is fetched as a whole, of all below it."""

    name: str
    is_block: bool
    sizes: tuple[int, ...]
    children: tuple[Unit, ...] = ()

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """Its own and its children's."""
        return self.sizes + tuple(size for child in self.children for size in child.all_sizes)

    def numel(self) -> int:
        return sum(self.all_sizes)

    def shared(self, ranks: int) -> int:
        """Elements that each of `ranks` holds when every parameter is cut into equal parts, rounded up."""
        return sum(math.ceil(size / ranks) for size in self.all_sizes)


@functools.lru_cache(maxsize=64)
def inventory(config: ModelConfig, tp_size: int) -> Unit:
    """The tree of the model of one of `tp_size` ranks; siblings stand in the order in which they run."""
    with torch.device("meta"):
        model = MegaVit.from_config(replace(config, depth=1), mesh=Mesh(tp_size=tp_size))
    root = _unit("", model)
    children: list[Unit] = []
    for child in root.children:
        children += [child] * config.depth if child.is_block else [child]
    return replace(root, children=tuple(children))


def _unit(name: str, module: nn.Module) -> Unit:
    if isinstance(module, ParallelBlock | SequentialBlock):
        return Unit(name, True, tuple(p.numel() for p in module.parameters()))
    sizes = tuple(p.numel() for p in module.parameters(recurse=False))
    return Unit(name, False, sizes, tuple(_children(module)))


def _children(module: nn.Module) -> Iterator[Unit]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):  # has no forward pass of its own
            yield from _children(child)
        else:
            yield _unit(name, child)
