"""Dense heads: from the patch tokens of chosen blocks to a map of numbers at the image's resolution.

A head takes taps, maps of patch tokens [B, D, rows, columns] as `MegaVit.forward_intermediates` gives them,
of any grid and patch size, and returns float32 [B, K, rows * P, columns * P]. It is whole on every TP rank
(but for the transformer blocks of `MaskTransformer`, which are sharded as the trunk's).

Letters: B batch, D width of the trunk, P patch side, K output channels (classes, bins or 1), C channels of
the head, N patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megavit.model.block import Norm, SequentialBlock
from megavit.model.config import ModelConfig, Recompute
from megavit.model.dense_layers import RATIOS, BatchNorm, Convolution, GroupNorm, Rescale, resize
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout
from megavit.parallel.linear import Linear


class DenseHead(nn.Module, ABC):
    """What all heads have in common; `num_taps` is how many blocks a head reads."""

    num_taps: ClassVar[int] = 1

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    @abstractmethod
    def forward(self, taps: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Taps [B, D, rows, columns] -> float32 [B, K, rows * P, columns * P]. Images of weight 0 (`weights`
        [B]) must not change what is found of the others."""

    def image_size(self, tap: Tensor) -> tuple[int, int]:
        """Height and width of the images that a tap is of."""
        return tap.shape[-2] * self.patch_size, tap.shape[-1] * self.patch_size


class LinearHead(DenseHead):
    """Batch norm and a 1 x 1 convolution, the linear probe of dense tasks (DINOv2, arXiv 2304.07193)."""

    def __init__(self, dim: int, outputs: int, patch_size: int, init: Initializer):
        super().__init__(patch_size)
        self.norm = BatchNorm(dim, init.scope("norm"))
        self.convolution = Convolution(dim, outputs, init.scope("convolution"))

    def forward(self, taps: Sequence[Tensor], weights: Tensor) -> Tensor:
        (tap,) = taps
        out = self.convolution(self.norm(tap, weights)).float()
        return resize(out, self.image_size(tap))


class DptDecoder(nn.Module):
    """Four taps [B, D, rows, columns] -> [B, C, 8 rows, 8 columns]: "Vision Transformers for Dense
    Prediction" (arXiv 2103.13413), without batch norm and without a class token (readout "ignore").

    The taps are brought to 4, 2, 1 and 1/2 times the grid, whatever the patch size is, and fused from the
    coarsest on. `widths` are their channels before they are projected to C.
    """

    def __init__(self, dim: int, channels: int, widths: Sequence[int], init: Initializer):
        super().__init__()
        self.reassemble = nn.ModuleList(
            _Reassemble(dim, width, channels, ratio_index, init.scope("reassemble").scope(ratio_index))
            for ratio_index, width in enumerate(widths)
        )
        self.fuse = nn.ModuleList(
            _Fusion(channels, init.scope("fuse").scope(level)) for level in range(len(widths))
        )

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        levels = [part(tap) for part, tap in zip(self.reassemble, taps, strict=True)]
        fused: Tensor | None = None
        for level in range(len(levels) - 1, -1, -1):
            rows, columns = (
                levels[level - 1].shape[2:] if level else (2 * side for side in levels[0].shape[2:])
            )
            fused = self.fuse[level](levels[level], fused, (rows, columns))
        assert fused is not None
        return fused


class _Reassemble(nn.Module):
    def __init__(self, dim: int, width: int, channels: int, level: int, init: Initializer):
        super().__init__()
        self.project = Convolution(dim, width, init.scope("project"))
        self.rescale = Rescale(width, RATIOS[level], init.scope("rescale"))
        self.out = Convolution(width, channels, init.scope("out"), size=3, bias=False)

    def forward(self, tap: Tensor) -> Tensor:
        found: Tensor = self.out(self.rescale(self.project(tap)))
        return found


class _Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, init: Initializer):
        super().__init__()
        self.first = Convolution(channels, channels, init.scope("first"), size=3)
        self.second = Convolution(channels, channels, init.scope("second"), size=3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(F.relu(self.first(F.relu(x))))
        return found


class _Fusion(nn.Module):
    def __init__(self, channels: int, init: Initializer):
        super().__init__()
        self.own = _Residual(channels, init.scope("own"))
        self.both = _Residual(channels, init.scope("both"))
        self.out = Convolution(channels, channels, init.scope("out"))

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = self.own(level)
        x = self.both(x if coarser is None else x + coarser)
        found: Tensor = self.out(resize(x, size, align_corners=True))
        return found


class DptHead(DenseHead):
    """`DptDecoder`, and its output head: half the channels, the image's resolution, 32 channels, the map."""

    num_taps = 4
    LAST = 32

    def __init__(self, dim: int, outputs: int, patch_size: int, channels: int, init: Initializer):
        super().__init__(patch_size)
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.decoder = DptDecoder(dim, channels, widths, init.scope("decoder"))
        half = max(1, channels // 2)
        self.first = Convolution(channels, half, init.scope("first"), size=3)
        self.last = Convolution(half, self.LAST, init.scope("last"), size=3)
        self.out = Convolution(self.LAST, outputs, init.scope("out"))

    def forward(self, taps: Sequence[Tensor], weights: Tensor) -> Tensor:
        x = self.first(self.decoder(taps))
        x = resize(x, self.image_size(taps[0]), align_corners=True)
        found: Tensor = self.out(F.relu(self.last(x))).float()
        return found


class PyramidHead(DenseHead):
    """UPerNet's pyramid (arXiv 1807.10221) on four taps, which become levels of 4, 2, 1 and 1/2 times the
    grid as ViTDet and BEiT make them: pyramid pooling on the coarsest, sums from there down, all levels side
    by side.

    Group norms in place of batch norms, so that nothing depends on the other images.
    """

    num_taps = 4
    POOLS = (1, 2, 3, 6)

    def __init__(self, dim: int, outputs: int, patch_size: int, channels: int, init: Initializer):
        super().__init__(patch_size)

        def unit(name: str, count: int, size: int) -> _Unit:
            return _Unit(count * channels, channels, size, init.scope(name))

        def units(name: str, count: int, size: int) -> nn.ModuleList:
            scope = init.scope(name)
            return nn.ModuleList(_Unit(channels, channels, size, scope.scope(i)) for i in range(count))

        self.lateral = nn.ModuleList(
            _Unit(dim, channels, 1, init.scope("lateral").scope(level)) for level in range(len(RATIOS))
        )
        self.rescale = nn.ModuleList(
            Rescale(channels, ratio, init.scope("rescale").scope(level)) for level, ratio in enumerate(RATIOS)
        )
        self.pooled = units("pooled", len(self.POOLS), 1)
        self.context = unit("context", 1 + len(self.POOLS), 3)
        self.smooth = units("smooth", len(RATIOS) - 1, 3)
        self.join = unit("join", len(RATIOS), 3)
        self.out = Convolution(channels, outputs, init.scope("out"))

    def forward(self, taps: Sequence[Tensor], weights: Tensor) -> Tensor:
        parts = zip(self.rescale, self.lateral, taps, strict=True)
        levels = [rescale(lateral(tap)) for rescale, lateral, tap in parts]
        levels[-1] = self._with_context(levels[-1])
        for level in range(len(levels) - 2, -1, -1):
            levels[level] = levels[level] + resize(levels[level + 1], tuple(levels[level].shape[2:]))
        levels[:-1] = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)]
        finest = tuple(levels[0].shape[2:])
        joined = self.join(torch.cat([resize(x, finest) for x in levels], 1))
        return resize(self.out(joined).float(), self.image_size(taps[0]))

    def _with_context(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        pools = [
            resize(unit(F.adaptive_avg_pool2d(x, side)), size)
            for unit, side in zip(self.pooled, self.POOLS, strict=True)
        ]
        found: Tensor = self.context(torch.cat([x, *pools], 1))
        return found


class _Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, inputs: int, channels: int, size: int, init: Initializer):
        super().__init__()
        self.convolution = Convolution(inputs, channels, init.scope("convolution"), size=size, bias=False)
        self.norm = GroupNorm(channels, init.scope("norm"))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(x)))


class MaskTransformer(DenseHead):
    """Segmenter's decoder (arXiv 2105.05633): a query for each class joins the patches in two transformer
    blocks; a class's map is the cosine of its query with each patch, normalised over the classes.

    `config` is the decoder's architecture: width, heads, depth, of sequential blocks. Its weights are sharded
    over the TP group.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        patch_size: int,
        config: ModelConfig,
        init: Initializer,
        recompute: Recompute = "none",
    ):
        super().__init__(patch_size)
        config.check_tensor_parallel(init.mesh.tp_size)
        width = config.dim
        self.enter = Linear(dim, width, init.scope("enter"))
        self.classes = init.normal("classes", Layout((outputs, width)), 0.02)
        self.blocks = nn.ModuleList(
            SequentialBlock(config, init.scope("blocks").scope(number), recompute)
            for number in range(config.depth)
        )
        self.norm = Norm(config, init.scope("norm"))
        self.patch_out = Linear(width, width, init.scope("patch_out"), bias=False)
        self.class_out = Linear(width, width, init.scope("class_out"), bias=False)
        self.map_weight = init.constant("map_weight", Layout((outputs,)), 1.0)
        self.map_bias = init.constant("map_bias", Layout((outputs,)), 0.0)

    def forward(self, taps: Sequence[Tensor], weights: Tensor) -> Tensor:
        (tap,) = taps
        x = self.enter(rearrange(tap, "b d h w -> b (h w) d"))  # [B, N, C]
        count = x.shape[1]
        x = torch.cat([x, self.classes.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        patches, queries = self.norm(x).split([count, len(self.classes)], 1)
        patches = F.normalize(self.patch_out(patches).float(), dim=-1)
        queries = F.normalize(self.class_out(queries).float(), dim=-1)
        maps = patches @ queries.transpose(1, 2)  # [B, N, K]
        maps = F.layer_norm(maps, maps.shape[2:], self.map_weight.float(), self.map_bias.float())
        maps = rearrange(maps, "b (h w) k -> b k h w", h=tap.shape[2])
        return resize(maps, self.image_size(tap))
