"""The architecture of a vision transformer: typed, frozen, validated on construction. Imports the standard
library only.

A preset is an architecture and nothing else; how a model is trained stands in `launch/recipes/*.yaml`. Sizes
are those of the papers: ViT-22B (arXiv 2302.05442, table 1) and Scaling ViTs (arXiv 2106.04560) for its
family.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megavit.fields import check_types, nearest, require_positive

Pool = Literal["map", "mean", "cls"]
Recompute = Literal["none", "full", "selective"]
Matmul = Literal["default", "fp8"]

# Sizes of 8-bit matrices are multiples of it.
_FP8_MULTIPLE = 16


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one vision transformer. The defaults are ViT-22B's choices (arXiv 2302.05442, section
    2).

    Args:
        name: preset that fills every field not given (vit_tiny, vit_s16, ..., vit_22b).
        image_size: height and width of the square input, in pixels.
        patch_size: height and width of a patch, in pixels; must divide image_size.
        channels: input channels (1 decodes to grey, 3 to RGB).
        num_classes: width of the classifier; 0 returns the pooled features instead.
        dim: token width D.
        depth: number of transformer blocks.
        num_heads: attention heads; must divide dim.
        mlp_dim: hidden width F of the MLP.
        dropout: drop rate after the MLP's GELU and on each block's output.
        emb_dropout: drop rate after the position embedding.
        block: parallel (one norm, attention and MLP side by side, one add) or sequential (the classic
            pre-norm pair).
        pool: map (attention pooling), mean (over patch tokens) or cls (a learned class token).
        num_registers: learned tokens without position that join the sequence and are dropped before pooling.
        qk_norm: normalise queries and keys over head_dim before the dot product.
        qkv_bias: biases on query, key and value projections, in the blocks and in the MAP head.
        norm_centring: subtract the mean too (LayerNorm); false is RMSNorm.
        norm_bias: a learned bias in the norms.
        norm_eps: added to the variance inside the norms.
        layer_scale: initial value of a learned per-channel scale on each residual branch; none leaves it out.
        head_bias: initial classifier bias; log_prior is -log(num_classes), ViT-22B uses -10.
        matmul: how the four linear layers of every block but the first and the last multiply: default is in
            the engine's dtype, fp8 rounds both factors to 8 bits (e4m3, scaled row by row), forward and
            backward, on GPUs from Ada and Hopper on. The weights are the same, so a saved run may go on with
            the other, and exports know nothing of it.
    """

    name: str = "vit_tiny"
    image_size: int = 224
    patch_size: int = 14
    channels: int = 3
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    dropout: float = 0.0
    emb_dropout: float = 0.0
    block: Literal["parallel", "sequential"] = "parallel"
    pool: Pool = "map"
    num_registers: int = 0
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_centring: bool = False
    norm_bias: bool = False
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    head_bias: float | Literal["log_prior"] = "log_prior"
    matmul: Matmul = "default"

    def __post_init__(self) -> None:
        check_types(self, "model.")
        require_positive(
            "model.", self, "image_size", "patch_size", "channels", "dim", "depth", "num_heads", "mlp_dim"
        )
        if self.image_size % self.patch_size:
            lower = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"model.image_size {self.image_size} is no multiple of model.patch_size {self.patch_size}; "
                f"use image_size {lower or self.patch_size} or {lower + self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"model.dim {self.dim} is not a multiple of model.num_heads {self.num_heads}; "
                f"use dim {self.num_heads * max(1, self.dim // self.num_heads)} or another head count"
            )
        for name in ("dropout", "emb_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.num_classes < 0 or self.num_registers < 0:
            raise ValueError(
                f"model.num_classes and model.num_registers cannot be negative, "
                f"got {self.num_classes} and {self.num_registers}"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"model.norm_eps must be positive, got {self.norm_eps}")
        if self.matmul == "fp8" and self.depth < 3:
            raise ValueError(
                f"model.matmul fp8 is for the blocks between the first and the last, and model.depth is "
                f"{self.depth}; leave it out"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: registers and, with pool='cls', the class token."""
        return self.num_registers + (self.pool == "cls")

    @property
    def num_tokens(self) -> int:
        """Sequence length N inside the blocks."""
        return self.num_patches + self.num_prefix_tokens

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ValueError unless `tp_size` divides what tensor parallelism shards (classes are padded
        instead)."""
        for name in ("num_heads", "mlp_dim"):
            if getattr(self, name) % tp_size:
                divisors = [n for n in range(1, tp_size) if self.num_heads % n == 0 and self.mlp_dim % n == 0]
                raise ValueError(
                    f"tensor_parallel_size {tp_size} does not divide model.{name} {getattr(self, name)}; "
                    f"use --tensor_parallel_size {divisors[-1]} or change model.{name}"
                )
        for name in ("dim", "mlp_dim") if self.matmul == "fp8" else ():
            if (local := getattr(self, name) // tp_size) % _FP8_MULTIPLE:
                raise ValueError(
                    f"model.matmul fp8 needs multiples of {_FP8_MULTIPLE}, and a rank's share of "
                    f"model.{name} {getattr(self, name)} is {local}; leave model.matmul out, or change "
                    f"--tensor_parallel_size"
                )


def _sized(
    dim: int, depth: int, mlp_dim: int, num_heads: int, patch_size: int, **fields: Any
) -> dict[str, Any]:
    shape = {"dim": dim, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads, "patch_size": patch_size}
    return shape | fields


# Width, depth, MLP width, heads, patch. The family's classifiers are ImageNet's; ViT-22B keeps JFT-3B's
# 29,593 classes.
_SHAPES: dict[str, dict[str, Any]] = {
    "vit_tiny": _sized(64, 3, 256, 4, 2, image_size=8, channels=1, num_classes=10),
    "vit_ti16": _sized(192, 12, 768, 3, 16),
    "vit_s16": _sized(384, 12, 1536, 6, 16),
    "vit_b16": _sized(768, 12, 3072, 12, 16),
    "vit_l16": _sized(1024, 24, 4096, 16, 16),
    "vit_h14": _sized(1280, 32, 5120, 16, 14),
    "vit_g14": _sized(1408, 40, 6144, 16, 14),
    "vit_G14": _sized(1664, 48, 8192, 16, 14),
    "vit_e14": _sized(1792, 56, 15360, 16, 14),
    "vit_22b": _sized(6144, 48, 24576, 48, 14, num_classes=29_593, head_bias=-10.0),
}

PRESETS: tuple[str, ...] = tuple(_SHAPES)
# What presets differ in.
PRESET_FIELDS: frozenset[str] = frozenset(f"model.{key}" for shape in _SHAPES.values() for key in shape)


def model_preset(name: str, **overrides: Any) -> ModelConfig:
    """The architecture called `name`, with fields replaced by `overrides`; ValueError for an unknown name or
    field, or a value that does not fit."""
    if name not in _SHAPES:
        raise ValueError(
            f"unknown model preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}"
        )
    return model_config({"name": name} | _SHAPES[name] | overrides)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a dictionary; ValueError for an unknown field, with the nearest known one."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for key in fields:
        if key not in known:
            raise ValueError(f"unknown model field {key!r}{nearest(key, known)}")
    return ModelConfig(**fields)
