"""MegaVit: patch embedding, blocks, pooling, classifier; its constructors, and loading exported weights.

Letters: B batch, C channels, S image side, P patch side, N tokens, D width. The model never sees DeepSpeed:
`train.engine` builds it inside `deepspeed.zero.Init` and hands in the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from megavit.model.block import Norm, make_block
from megavit.model.config import ModelConfig, Recompute, model_config, model_preset
from megavit.model.head import Classifier, MapHead, wide
from megavit.parallel.collectives import dropout
from megavit.parallel.init import Initializer
from megavit.parallel.layout import Layout, layout_of
from megavit.parallel.linear import is_autocast_enabled, linear
from megavit.parallel.mesh import Mesh

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
POSITION = "embed.position"  # the one weight that is resized to fit another image size


class PatchEmbedding(nn.Module):
    """[B, C, S, S] -> [B, (S/P)^2, D]: a convolution of stride P as one matmul, plus a learned position
    embedding."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__()
        self.patch_size = config.patch_size
        fan_in = config.channels * config.patch_size**2
        self.weight = init.lecun_normal("weight", Layout((config.dim, fan_in)))
        self.bias = init.constant("bias", Layout((config.dim,)), 0.0)
        self.position = init.normal("position", Layout((config.num_patches, config.dim)), config.dim**-0.5)

    def forward(self, img: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(img, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return linear(patches, self.weight, self.bias) + self.position


class MegaVit(nn.Module):
    """The vision transformer of "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442).

    `MegaVit(image_size=..., patch_size=..., ...)` builds any shape, `from_preset` the paper's,
    `from_pretrained` loads an export. `options` are the further fields of `ModelConfig` (pool, num_registers,
    qk_norm, ...). With a `mesh` of tp_size > 1 it holds this rank's shard; the weights depend on `seed` and
    the logical shape only. `deferred_init` leaves them unfilled, see `parallel.init`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        channels: int = 3,
        mesh: Mesh | None = None,
        seed: int = 0,
        recompute: Recompute = "none",
        deferred_init: bool = False,
        **options: Any,
    ):
        super().__init__()
        sizes = {"image_size": image_size, "patch_size": patch_size, "num_classes": num_classes, "dim": dim}
        sizes |= {"depth": depth, "num_heads": heads, "mlp_dim": mlp_dim, "channels": channels}
        rates = {"dropout": dropout, "emb_dropout": emb_dropout}
        self.config = config = model_config({"name": "custom"} | sizes | rates | options)
        self.mesh = mesh = mesh or Mesh.single()
        config.check_tensor_parallel(mesh.tp_size)
        init = Initializer(seed, mesh, deferred=deferred_init)
        self.embed = PatchEmbedding(config, init.scope("embed"))
        self.prefix = (
            init.normal("prefix", Layout((config.num_prefix_tokens, config.dim)), 1e-6)
            if config.num_prefix_tokens
            else None
        )
        self.blocks = nn.ModuleList(
            make_block(config, init.scope("blocks").scope(i), recompute) for i in range(config.depth)
        )
        self.norm = Norm(config, init.scope("norm"))
        self.pool = MapHead(config, init.scope("pool")) if config.pool == "map" else None
        self.head = Classifier(config, init.scope("head")) if config.num_classes else None

    @classmethod
    def from_config(cls, config: ModelConfig, **arguments: Any) -> MegaVit:
        """Build from a `ModelConfig`; `arguments` are `mesh`, `seed`, `recompute` and `deferred_init`."""
        fields = dataclasses.asdict(config)
        return cls(heads=fields.pop("num_heads"), **fields, **arguments)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        mesh: Mesh | None = None,
        seed: int = 0,
        recompute: Recompute = "none",
        **overrides: Any,
    ) -> MegaVit:
        """The paper family's model `name` (see `megavit.PRESETS`), e.g. `from_preset("vit_22b")`, 22.4e9
        parameters.

        `overrides` replace fields of its `ModelConfig`. Use `with torch.device("meta")` to build without
        memory.
        """
        return cls.from_config(model_preset(name, **overrides), mesh=mesh, seed=seed, recompute=recompute)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, mesh: Mesh | None = None, **overrides: Any) -> MegaVit:
        """Load an export (`config.json` and `model.safetensors`), or that of a run folder, in evaluation
        mode, on one process, or this rank's shard of it on a mesh.

        `overrides` replace fields of the saved configuration; with another `image_size` the position
        embedding is resized. Raises ValueError, naming the file, for a folder that is no export or a damaged
        one, and, before any memory is allocated, for weights that do not match the configuration.
        """
        from megavit.model.exported import open_export

        with open_export(Path(folder), **overrides) as (config, weights):
            model = cls.from_config(config, mesh=mesh)
            model.load_logical(weights.get_tensor)
        return model.eval()

    @torch.no_grad()
    def load_logical(self, get: Callable[[str], Tensor]) -> None:
        """Copy logical tensors, fetched one at a time with `get(name)`, into this rank's shards.

        Raises ValueError when shapes do not match; the position embedding alone is resized to fit.
        """
        for name, parameter in self.named_parameters():
            layout, logical = layout_of(parameter), get(name)
            if name == POSITION:
                logical = resize_position(logical, self.config.grid_size)
            if tuple(logical.shape) != layout.shape:
                raise ValueError(f"{name} has shape {tuple(logical.shape)}, the model needs {layout.shape}")
            parameter.copy_(layout.take(logical, self.mesh.tp_rank, self.mesh.tp_size))

    def forward(
        self, img: Tensor, *, return_maps: bool = False, local_logits: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [B, num_classes] of images [B, C, S, S] in [-1, 1]; pooled features [B, D] if num_classes is
        0.

        `return_maps` adds every block's attention matrix [B, H, N, N], by an explicit softmax that agrees
        with the fused kernel to rounding but holds the matrix. `local_logits` leaves the classes sharded: [B,
        ceil(C/tp)].
        Raises ValueError for another image shape.
        """
        tokens, maps = self.encode(img, return_maps=return_maps)
        out = self.pool_tokens(tokens)
        if self.head is not None:
            out = self.head(out)
            out = out if local_logits else self.head.gather_logits(out)
        return (out, maps) if return_maps else out

    def encode(self, img: Tensor, *, return_maps: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Normalised tokens [B, N, D] after the last block, prefix tokens first, and the attention maps if
        asked for."""
        self._check_image(img)
        x = self.embed(img)
        x = dropout(self.mesh, x, self.config.emb_dropout, self.training, sharded=False)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        maps = []
        for block in self.blocks:
            x, attention = block(x, return_maps)
            maps.append(attention)
        return self.norm(x), maps if return_maps else []

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, D], the features that the classifier reads ("pre_logits"), float32. Registers do
        not take part."""
        patches = tokens[:, self.config.num_prefix_tokens :]
        if self.pool is not None:
            return self.pool(patches)
        if self.config.pool == "mean":
            return patches.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        return wide(tokens[:, self.config.num_registers])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that `forward` takes."""
        return self.embed.weight.dtype

    def compile_blocks(self) -> None:
        """torch.compile each block's forward, inside ZeRO's hooks; blocks share one compiled graph."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward)

    def _check_image(self, img: Tensor) -> None:
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if img.ndim != 4 or tuple(img.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(img.shape)} do not fit this model, which takes "
                f"[batch, {', '.join(map(str, expected))}]; resize them or build it with another image_size"
            )
        weight = self.embed.weight
        if img.dtype != weight.dtype and not is_autocast_enabled(weight.device.type):
            hint = (
                "scale them to floating point in [-1, 1] first, as megavit.data.device.to_model_input does"
                if not img.is_floating_point()
                else f"convert them with images.to({weight.dtype}), or use torch.autocast"
            )
            raise ValueError(f"images are {img.dtype}, the model's weights {weight.dtype}; {hint}")


def resize_position(position: Tensor, grid_size: int) -> Tensor:
    """A position embedding [n^2, D] of an n x n grid, resized bilinearly to [grid_size^2, D]; float32
    inside."""
    old = round(position.shape[0] ** 0.5)
    if old * old != position.shape[0]:
        raise ValueError(f"a position embedding of {position.shape[0]} tokens is no square grid")
    if old == grid_size:
        return position
    grid = rearrange(position.float(), "(h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bilinear", antialias=True)
    return rearrange(grid, "1 d h w -> (h w) d").to(position.dtype)
