"""Initial weights that depend on (seed, parameter name) alone: not on the TP size, the DP size, the device or
the order.

Each parameter has its own counter-based stream, addressed by the element's index in the logical tensor, so a
rank draws only the elements it keeps. Values are made with numpy because `deepspeed.zero.Init` replaces
torch's constructors and would round the draws to the model's dtype before they are scaled.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from megavit.parallel.layout import Layout, Piece
from megavit.parallel.mesh import Mesh

# Standard deviation of a unit normal cut at +-2, which flax's lecun_normal divides by.
_TRUNCATED_STD = 0.87962566103423978


class Initializer:
    """Makes this rank's shards of the parameters under `path`; every method returns an `nn.Parameter` with a
    `tp_layout`.

    The parameter is allocated with `torch.empty`, so a default device (meta, cuda) and `deepspeed.zero.Init`
    apply.
    """

    def __init__(self, seed: int, mesh: Mesh, path: str = ""):
        self.seed = seed
        self.mesh = mesh
        self.path = path

    def scope(self, name: str | int) -> Initializer:
        """The initializer for a child module, named as in `named_parameters`."""
        return Initializer(self.seed, self.mesh, f"{self.path}.{name}" if self.path else str(name))

    def constant(self, name: str, layout: Layout, value: float) -> torch.nn.Parameter:
        """All entries `value`, padding zero."""
        parameter = self._allocate(layout)
        if not parameter.is_meta:
            self._fill(parameter, layout, np.full(layout.shape, value, np.float32))
        return parameter

    def normal(self, name: str, layout: Layout, std: float) -> torch.nn.Parameter:
        """Normal(0, std). Draws the whole logical tensor: for small ones (biases, embeddings)."""
        parameter = self._allocate(layout)
        if not parameter.is_meta:
            values = self._generator(name).standard_normal(layout.shape, dtype=np.float32) * np.float32(std)
            self._fill(parameter, layout, values)
        return parameter

    def lecun_normal(self, name: str, layout: Layout) -> torch.nn.Parameter:
        """Normal cut at two standard deviations, variance 1/fan_in of a [out, in] weight (flax's default for
        convs)."""
        parameter = self._allocate(layout)
        if not parameter.is_meta:
            generator = self._generator(name)
            values = generator.standard_normal(layout.shape, dtype=np.float32)
            while (outside := np.abs(values) > 2.0).any():
                values[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
            std = 1.0 / math.sqrt(layout.shape[1]) / _TRUNCATED_STD
            self._fill(parameter, layout, values * np.float32(std))
        return parameter

    def xavier_uniform(self, name: str, layout: Layout) -> torch.nn.Parameter:
        """Uniform(-b, b), b = sqrt(6 / (fan_in + fan_out)) of a [out, in] weight; a rank draws only what it
        keeps.

        Each part of a fused weight has its own fan_out: q, k and v are three [D, D] matrices, not one [3D,
        D]. The fans are the logical ones, whatever the sharding. A [D] vector counts as [D, 1].
        """
        parameter = self._allocate(layout)
        if parameter.is_meta:
            return parameter
        rows, cols = layout.shape[0], math.prod(layout.shape[1:])
        local = np.empty((parameter.shape[0], parameter.numel() // parameter.shape[0]), dtype=np.float32)
        if layout.dim == 1:
            (piece,) = layout.pieces(self.mesh.tp_rank, self.mesh.tp_size)
            for row in range(rows):
                local[row] = self._uniform(name, row * cols + piece.start, piece.length)
            local *= 2.0 * _xavier_bound(cols, rows)
        else:
            parts = layout.parts or (rows,)
            pieces = layout.pieces(self.mesh.tp_rank, self.mesh.tp_size) or [Piece(0, 0, rows)]
            for part, piece in zip(parts, pieces, strict=True):
                values = self._uniform(name, piece.start * cols, piece.length * cols).reshape(-1, cols)
                local[piece.local_start : piece.local_start + piece.length] = values * (
                    2.0 * _xavier_bound(cols, part)
                )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(local).view(parameter.shape))
        return parameter

    def _allocate(self, layout: Layout) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(layout.local_shape(self.mesh.tp_size)))
        parameter.tp_layout = layout  # type: ignore[attr-defined]
        # DeepSpeed's name: counts the gradient norm of a sharded parameter on every TP rank, of a replicated
        # one once.
        parameter.model_parallel = layout.dim is not None  # type: ignore[attr-defined]
        return parameter

    def _fill(self, parameter: torch.nn.Parameter, layout: Layout, logical: np.ndarray) -> None:
        local = layout.take(torch.from_numpy(logical), self.mesh.tp_rank, self.mesh.tp_size)
        with torch.no_grad():
            parameter.copy_(local)

    def _bits(self, name: str) -> np.random.PCG64DXSM:
        path = f"{self.path}.{name}" if self.path else name
        digest = hashlib.blake2b(f"{self.seed}/{path}".encode(), digest_size=16).digest()
        return np.random.PCG64DXSM(int.from_bytes(digest, "little"))

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(self._bits(name))

    def _uniform(self, name: str, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of the parameter's endless stream of uniforms in [-1/2, 1/2)."""
        bits = self._bits(name).advance(start // 2)  # a 64-bit state makes two 32-bit draws
        odd = start % 2
        return np.random.Generator(bits).random(count + odd, dtype=np.float32)[odd:] - np.float32(0.5)


def _xavier_bound(fan_in: int, fan_out: int) -> np.float32:
    return np.float32(math.sqrt(6.0 / (fan_in + fan_out)))
