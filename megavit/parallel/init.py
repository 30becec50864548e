"""Initial weights that depend on (seed, parameter name) alone: not on the TP size, the DP size, the device or
the order.

Each parameter has its own counter-based stream, addressed by the element's index in the logical tensor, so a
rank draws only the elements it keeps: of its TP shard, or, when filling is deferred until ZeRO has cut the
weights, of its slice of that. Values are made with numpy because `deepspeed.zero.Init` replaces torch's
constructors and would round the draws to the model's dtype before they are scaled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavit.parallel.layout import Box, Layout
from megavit.parallel.mesh import Mesh

# Standard deviation of a unit normal cut at +-2, which flax's lecun_normal divides by.
_TRUNCATED_STD = 0.87962566103423978


@dataclass(frozen=True)
class InitialValues:
    """What a parameter starts as: any part of it can be drawn by itself, the same on every rank."""

    layout: Layout
    key: str  # seed and full name: the stream
    fill: Callable[[InitialValues, Sequence[Box], np.ndarray], None]
    scale: float = 0.0

    def read(self, boxes: Sequence[Box], out: np.ndarray) -> None:
        """Fill the flat float32 slice that `boxes` describe; elements in no box (padding) are left."""
        self.fill(self, boxes, out)

    def generator(self, skip: int = 0) -> np.random.Generator:
        """The stream of 64-bit words, from word `skip` on."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=16).digest()
        bits = np.random.PCG64DXSM(int.from_bytes(digest, "little"))
        return np.random.Generator(bits.advance(skip) if skip else bits)


class Initializer:
    """Makes this rank's shards of the parameters under `path`; every method returns an `nn.Parameter` with a
    `logical_name` (its path), a `tp_layout` and `initial_values`.

    The parameter is allocated with `torch.empty`, so a default device (meta, cuda) and `deepspeed.zero.Init`
    apply. With `deferred` it stays as allocated: whoever holds its parts fills them from `initial_values`.
    """

    def __init__(self, seed: int, mesh: Mesh, path: str = "", *, deferred: bool = False):
        self.seed = seed
        self.mesh = mesh
        self.path = path
        self.deferred = deferred

    def scope(self, name: str | int) -> Initializer:
        """The initializer for a child module, named as in `named_parameters`."""
        path = f"{self.path}.{name}" if self.path else str(name)
        return Initializer(self.seed, self.mesh, path, deferred=self.deferred)

    def constant(self, name: str, layout: Layout, value: float) -> torch.nn.Parameter:
        """All entries `value`, padding zero."""
        return self._make(name, layout, _fill_constant, value)

    def normal(self, name: str, layout: Layout, std: float) -> torch.nn.Parameter:
        """Normal(0, std). Draws the whole logical tensor: for small ones (biases, embeddings)."""
        return self._make(name, layout, _fill_normal, std)

    def lecun_normal(self, name: str, layout: Layout) -> torch.nn.Parameter:
        """Normal cut at two standard deviations, variance 1/fan_in of a [out, in] weight (flax's default for
        convs). Draws the whole logical tensor."""
        return self._make(name, layout, _fill_lecun_normal, 1.0 / math.sqrt(layout.shape[1]) / _TRUNCATED_STD)

    def xavier_uniform(self, name: str, layout: Layout) -> torch.nn.Parameter:
        """Uniform(-b, b), b = sqrt(6 / (fan_in + fan_out)) of a [out, in] weight; a rank draws only what it
        keeps.

        Each part of a fused weight has its own fan_out: q, k and v are three [D, D] matrices, not one [3D,
        D]. The fans are the logical ones, whatever the sharding. A [D] vector counts as [D, 1].
        """
        return self._make(name, layout, _fill_xavier_uniform)

    def statistic(self, name: str, layout: Layout, value: float) -> torch.Tensor:
        """What is part of the state but not trained, such as running statistics: a float32 tensor of entries
        `value`, whole on every rank, to be registered as a buffer."""
        assert layout.dim is None, "statistics are whole on every rank"
        path = f"{self.path}.{name}" if self.path else name
        # numpy's, because `deepspeed.zero.Init` makes torch's constructors return its own dtype.
        found = torch.from_numpy(np.full(layout.shape, value, np.float32)).to(torch.empty(0).device)
        found.logical_name = path  # type: ignore[attr-defined]
        found.tp_layout = layout  # type: ignore[attr-defined]
        found.initial_values = InitialValues(  # type: ignore[attr-defined]
            layout, f"{self.seed}/{path}", _fill_constant, value
        )
        return found

    def _make(
        self,
        name: str,
        layout: Layout,
        fill: Callable[[InitialValues, Sequence[Box], np.ndarray], None],
        scale: float = 0.0,
    ) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(layout.local_shape(self.mesh.tp_size)))
        path = f"{self.path}.{name}" if self.path else name
        values = InitialValues(layout, f"{self.seed}/{path}", fill, scale)
        parameter.logical_name = path  # type: ignore[attr-defined]
        parameter.tp_layout = layout  # type: ignore[attr-defined]
        parameter.initial_values = values  # type: ignore[attr-defined]
        # DeepSpeed's name: counts the gradient norm of a sharded parameter on every TP rank, of a replicated
        # one once.
        parameter.model_parallel = layout.dim is not None  # type: ignore[attr-defined]
        if not parameter.is_meta and not self.deferred:
            initialise(parameter, self.mesh)
        return parameter


def logical_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module under the names that their initializers gave them: those of checkpoints and
    exports, which do not depend on what the module is part of. ValueError, with the fix, for a parameter that
    no initializer made, and for two of one name."""
    found: dict[str, torch.nn.Parameter] = {}
    for path, parameter in module.named_parameters():
        name = getattr(parameter, "logical_name", None)
        if name is None:
            raise ValueError(
                f"the parameter {path} was not made by an Initializer, so its initial value and its place in "
                f"checkpoints are not known; make it with init.xavier_uniform, init.constant, ..., or use "
                f"megavit.parallel.linear.Linear"
            )
        if name in found:
            raise ValueError(
                f"two parameters are called {name}, one of them is {path}; make the modules of the task with "
                f"a scope of their own, init.scope('head')"
            )
        found[name] = parameter
    return found


def logical_statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module that `Initializer.statistic` made, under the names that it gave them."""
    return {name: buffer for buffer in module.buffers() if (name := getattr(buffer, "logical_name", None))}


@torch.no_grad()
def initialise(parameter: torch.nn.Parameter, mesh: Mesh) -> None:
    """Fill this rank's shard with its initial values."""
    values, flat = initial_values_of(parameter), np.zeros(parameter.numel(), np.float32)
    values.read(values.layout.boxes(mesh.tp_rank, mesh.tp_size, 0, flat.size), flat)
    parameter.copy_(torch.from_numpy(flat).view(parameter.shape))


def initial_values_of(parameter: torch.Tensor) -> InitialValues:
    """The values that `Initializer` attached to a parameter or statistic."""
    values = getattr(parameter, "initial_values", None)
    assert isinstance(values, InitialValues), "parameters are made by megavit.parallel.init.Initializer"
    return values


def _fill_constant(values: InitialValues, boxes: Sequence[Box], out: np.ndarray) -> None:
    for box in boxes:
        out[box.offset : box.offset + box.rows * box.columns] = values.scale


def _fill_normal(values: InitialValues, boxes: Sequence[Box], out: np.ndarray) -> None:
    drawn = values.generator().standard_normal(values.layout.matrix_shape, dtype=np.float32)
    _take(drawn * np.float32(values.scale), boxes, out)


def _fill_lecun_normal(values: InitialValues, boxes: Sequence[Box], out: np.ndarray) -> None:
    generator = values.generator()
    drawn = generator.standard_normal(values.layout.matrix_shape, dtype=np.float32)
    while (outside := np.abs(drawn) > 2.0).any():
        drawn[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
    _take(drawn * np.float32(values.scale), boxes, out)


def _take(whole: np.ndarray, boxes: Sequence[Box], out: np.ndarray) -> None:
    for box in boxes:
        part = whole[box.row : box.row + box.rows, box.column : box.column + box.columns]
        out[box.offset : box.offset + part.size] = part.reshape(-1)


def _fill_xavier_uniform(values: InitialValues, boxes: Sequence[Box], out: np.ndarray) -> None:
    rows, columns = values.layout.matrix_shape
    for box in boxes:
        part = out[box.offset : box.offset + box.rows * box.columns]
        if box.columns == columns:
            part[:] = _uniform(values, box.row * columns, part.size)
        else:
            for number, row in enumerate(part.reshape(box.rows, box.columns)):
                row[:] = _uniform(values, (box.row + number) * columns + box.column, box.columns)
        part *= 2.0 * _xavier_bound(columns, _part_of_row(values.layout, box.row, rows))


def _part_of_row(layout: Layout, row: int, rows: int) -> int:
    """Length of the fused part that a row belongs to; boxes do not cross parts."""
    if layout.dim != 0:
        return rows
    for part in layout.parts:
        if row < part:
            return part
        row -= part
    raise AssertionError((layout, row))


def _uniform(values: InitialValues, start: int, count: int) -> np.ndarray:
    """Elements [start, start + count) of the parameter's endless stream of uniforms in [-1/2, 1/2)."""
    odd = start % 2  # a 64-bit state makes two 32-bit draws
    drawn = values.generator(start // 2).random(count + odd, dtype=np.float32)
    return drawn[odd:] - np.float32(0.5)


def _xavier_bound(fan_in: int, fan_out: int) -> np.float32:
    return np.float32(math.sqrt(6.0 / (fan_in + fan_out)))
