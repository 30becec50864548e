"""The models that are compared: ours under each recompute policy, and other people's vision transformers at
the same shape.

A peer's package is imported when the peer is built, and not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megavit.fields import nearest
from megavit.model.config import Recompute


@dataclass(frozen=True)
class Shape:
    """One size at which all models are built; the MLP is 4 `dim` wide, heads divide `dim`."""

    dim: int
    depth: int
    heads: int
    batch: int
    image_size: int = 224
    patch_size: int = 14
    num_classes: int = 1000

    @property
    def mlp_dim(self) -> int:
        return 4 * self.dim

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def parse(cls, text: str, image_size: int, patch_size: int, num_classes: int) -> Shape:
        """A shape from `width x depth x heads x batch`, as in 384x6x6x8. ValueError for anything else."""
        parts = text.split("x")
        if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
            raise ValueError(f"a shape is width x depth x heads x batch, as in 384x6x6x8, not {text!r}")
        dim, depth, heads, batch = map(int, parts)
        if dim % heads or image_size % patch_size:
            raise ValueError(
                f"{text}, {image_size} px / {patch_size}: heads must divide the width, patches the image"
            )
        return cls(dim, depth, heads, batch, image_size, patch_size, num_classes)

    def __str__(self) -> str:
        return (
            f"width {self.dim}, depth {self.depth}, heads {self.heads}, batch {self.batch}, "
            f"{self.image_size} px / {self.patch_size}, {self.num_classes} classes"
        )


@dataclass(frozen=True)
class Contestant:
    """A model that can be built at any shape.

    `blocks` lists the modules that `--compile` compiles, one block or one branch of it each. `alike` says
    that the model does what ours does: attention with normalised queries and keys, attention pooling, a
    linear classifier.
    """

    package: str
    build: Callable[[Shape], nn.Module]
    blocks: Callable[[Any], Iterable[nn.Module]]
    alike: bool
    note: str


def _ours(recompute: Recompute) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        from megavit.model.vit import MegaVit

        return MegaVit(
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            num_classes=shape.num_classes,
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            mlp_dim=shape.mlp_dim,
            recompute=recompute,
        )

    return build


def _timm(block: str, **options: Any) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        from timm.models import vision_transformer as timm_vit

        return timm_vit.VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            num_classes=shape.num_classes,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            block_fn=getattr(timm_vit, block),
            **options,
        )

    return build


def _vit_pytorch(module: str) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        package = importlib.import_module(f"vit_pytorch.{module}")
        model = package.SimpleViT(**_lucidrains_arguments(shape))
        if isinstance(model.linear_head, nn.LayerNorm):  # the QK-norm variant ends without a classifier
            model.linear_head = nn.Sequential(model.linear_head, nn.Linear(shape.dim, shape.num_classes))
        return model

    return build


def _mega_vit(shape: Shape) -> nn.Module:
    from mega_vit.main import MegaVit

    return MegaVit(**_lucidrains_arguments(shape))


def _lucidrains_arguments(shape: Shape) -> dict[str, int]:
    return {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "num_classes": shape.num_classes,
        "dim": shape.dim,
        "depth": shape.depth,
        "heads": shape.heads,
        "dim_head": shape.dim // shape.heads,
        "mlp_dim": shape.mlp_dim,
    }


def _branches(model: Any) -> Iterable[nn.Module]:
    return [branch for layer in model.transformer.layers for branch in layer]


class _HuggingFace(nn.Module):
    """Hugging Face's classifier, returning logits alone."""

    def __init__(self, shape: Shape):
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=shape.mlp_dim,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            num_labels=shape.num_classes,
            attn_implementation="sdpa",
        )
        self.inner = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).logits

    def blocks(self) -> list[nn.Module]:
        layers = [module for module in self.inner.modules() if type(module).__name__ == "ViTLayer"]
        assert layers, "this transformers release has no ViTLayer"
        return layers


def _of(attribute: str) -> Callable[[Any], Iterable[nn.Module]]:
    return lambda model: getattr(model, attribute)


_TIMM_MAP = {"qk_norm": True, "qkv_bias": False, "class_token": False, "global_pool": "map"}
_NO_QK = "no QK norm, "

CONTESTANTS = {
    "megavit": Contestant("megavit", _ours("none"), _of("blocks"), True, "this repository"),
    "megavit-selective": Contestant(
        "megavit", _ours("selective"), _of("blocks"), True, "recompute norms and GELU"
    ),
    "megavit-full": Contestant("megavit", _ours("full"), _of("blocks"), True, "recompute each block"),
    "timm-parallel": Contestant(
        "timm", _timm("ParallelScalingBlock", **_TIMM_MAP), _of("blocks"), True, "LayerNorm, erf GELU"
    ),
    "timm-parallel-tanh": Contestant(
        "timm",
        _timm("ParallelScalingBlock", **_TIMM_MAP, act_layer="gelu_tanh"),
        _of("blocks"),
        True,
        "LayerNorm, our GELU (tanh)",
    ),
    "timm-sequential": Contestant(
        "timm", _timm("Block", **_TIMM_MAP), _of("blocks"), True, "LayerNorm, erf GELU, sequential block"
    ),
    "timm-cls": Contestant(
        "timm", _timm("Block"), _of("blocks"), False, _NO_QK + "class token, sequential block"
    ),
    "vit-pytorch-flash": Contestant(
        "vit_pytorch",
        _vit_pytorch("simple_flash_attn_vit"),
        _branches,
        False,
        _NO_QK + "mean pooling, fixed positions",
    ),
    "vit-pytorch-qk-norm": Contestant(
        "vit_pytorch",
        _vit_pytorch("simple_vit_with_qk_norm"),
        _branches,
        False,
        "mean pooling, explicit softmax; classifier added",
    ),
    "mega-vit": Contestant(
        "mega_vit", _mega_vit, _branches, False, "normalises K and V, class token, three norms a block"
    ),
    "hf-vit": Contestant(
        "transformers", _HuggingFace, lambda model: model.blocks(), False, _NO_QK + "class token, SDPA"
    ),
}
REFERENCE = "timm-parallel"


def choose(names: Iterable[str] | None) -> tuple[dict[str, Contestant], list[str]]:
    """The contestants called `names` (None: all), and a line for each one whose package is not installed.

    Raises ValueError for an unknown name.
    """
    chosen, left_out = {}, []
    for name in CONTESTANTS if names is None else names:
        if name not in CONTESTANTS:
            raise ValueError(
                f"no model is called {name!r}{nearest(name, CONTESTANTS)}; known: {', '.join(CONTESTANTS)}"
            )
        contestant = CONTESTANTS[name]
        if importlib.util.find_spec(contestant.package) is None:
            left_out.append(
                f"left out: {name} needs {contestant.package}, which is not installed: "
                f"pip install 'megavit[peers]'"
            )
        else:
            chosen[name] = contestant
    return chosen, left_out
