"""What one TP rank's model consists of, as DeepSpeed's ZeRO-3 sees it: modules, in the order they run, with
the sizes of their parameters. Read off the production model, built without memory, as the task `classify`
trains it: `--freeze` names its parts below `trunk`."""

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
from megavit.train.optim import freeze as freeze_modules


@dataclass(frozen=True)
class Unit:
    """A module that ZeRO-3 fetches for: the local sizes, in elements, of its own parameters, or, for a block,
    which is fetched as a whole, of all below it; `trained` are those of parameters that are not frozen.

    The backward pass ends where nothing before is trained: `has_backward` says whether it reaches the module.
    In a trace (`trace.py`) a unit is one call of a module, the `call`-th; what is `traced` needs no formulas.
    """

    name: str
    is_block: bool
    sizes: tuple[int, ...]
    trained: tuple[int, ...]
    children: tuple[Unit, ...] = ()
    has_backward: bool = True
    call: int = -1
    traced: bool = False

    def walk(self) -> Iterator[Unit]:
        """It and all below it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """Its own and its children's."""
        return self.sizes + tuple(size for child in self.children for size in child.all_sizes)

    def numel(self) -> int:
        return sum(self.all_sizes)

    def shared(self, ranks: int) -> int:
        """Elements that each of `ranks` holds when every parameter is cut into equal parts, rounded up."""
        return sum(math.ceil(size / ranks) for size in self.all_sizes)

    def trained_part(self) -> Unit:
        """The same tree without the frozen parameters."""
        return replace(
            self, sizes=self.trained, children=tuple(child.trained_part() for child in self.children)
        )


@functools.lru_cache(maxsize=64)
def inventory(config: ModelConfig, tp_size: int, freeze: str = "") -> Unit:
    """The tree of the model of one of `tp_size` ranks; siblings stand in the order in which they run.
    `freeze` is the run's: ValueError for what the trainer refuses too."""
    depth = config.depth if freeze else 1  # blocks are alike unless some are frozen
    root = _unit("", model_on_meta(replace(config, depth=depth), tp_size, freeze))
    children: list[Unit] = []
    for child in root.children:
        children += [child] * (config.depth // depth) if child.is_block else [child]
    return _mark_backward(replace(root, children=tuple(children)), reached=False)


def flat_inventory(module: nn.Module) -> Unit:
    """Every parameter of any module once: a unit for each block and for each other module that has some."""
    found: list[Unit] = []

    def visit(part: nn.Module, path: str) -> None:
        unit = module_unit(path, part)
        found.extend([unit] if unit.sizes else [])
        for name, child in () if unit.is_block else part.named_children():
            visit(child, f"{path}.{name}".lstrip("."))

    visit(module, "")
    return Unit("", False, (), (), tuple(found))


def model_on_meta(config: ModelConfig, tp_size: int, freeze: str) -> MegaVit:
    """One TP rank's model without memory, its frozen parameters without gradients."""
    with torch.device("meta"):
        model = MegaVit.from_config(config, mesh=Mesh(tp_size=tp_size))
    freeze_modules(nn.ModuleDict({"trunk": model}), freeze)
    return model


def _mark_backward(unit: Unit, *, reached: bool) -> Unit:
    """`unit`, its `has_backward` and those below it set. `reached`: whether anything before it is trained."""
    reached = reached or bool(unit.trained)
    children: list[Unit] = []
    for child in unit.children:
        children.append(_mark_backward(child, reached=reached))
        reached = children[-1].has_backward
    return replace(unit, children=tuple(children), has_backward=reached)


def module_unit(name: str, module: nn.Module) -> Unit:
    """The unit of a module, without children."""
    is_block = isinstance(module, ParallelBlock | SequentialBlock)
    own = list(module.parameters(recurse=is_block))
    sizes = tuple(parameter.numel() for parameter in own)
    return Unit(name, is_block, sizes, tuple(part.numel() for part in own if part.requires_grad))


def _unit(name: str, module: nn.Module) -> Unit:
    unit = module_unit(name, module)
    return unit if unit.is_block else replace(unit, children=tuple(_children(module)))


def _children(module: nn.Module) -> Iterator[Unit]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):  # has no forward pass of its own
            yield from _children(child)
        else:
            yield _unit(name, child)
