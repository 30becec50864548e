"""The models that are compared: ours under each recompute policy, and other people's vision transformers at
the same config.

A peer's package is imported when the peer is built, and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megavit.model.config import ModelConfig, Recompute


def parse_shape(text: str, image_size: int, patch_size: int, num_classes: int) -> tuple[ModelConfig, int]:
    """The architecture and the batch of `width x depth x heads x batch`, as in 384x6x6x8. The MLP is four
    times as wide. ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--shape {text}: a shape is width x depth x heads x batch, as in 384x6x6x8")
    dim, depth, heads, batch = map(int, parts)
    config = ModelConfig(
        name=text,
        image_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_dim=4 * dim,
    )
    return config, batch


@dataclass(frozen=True)
class Contestant:
    """A model that can be built at any config.

    `alike` says that the model does what ours does: attention with normalised queries and keys, attention
    pooling, a linear classifier. `block_classes` names the classes of the modules that `--compile` compiles,
    a block or a branch of one.
    """

    package: str
    build: Callable[[ModelConfig], nn.Module]
    block_classes: tuple[str, ...]
    alike: bool
    note: str

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        found = [module for module in model.modules() if type(module).__name__ in self.block_classes]
        assert found, f"this release of {self.package} has no {' or '.join(self.block_classes)}"
        return found


def _ours(recompute: Recompute, note: str) -> Contestant:
    def build(config: ModelConfig) -> nn.Module:
        from megavit.model.vit import MegaVit

        return MegaVit.from_config(config, recompute=recompute)

    return Contestant("megavit", build, ("ParallelBlock",), True, note)


def _timm(block: str, alike: bool, note: str, **options: Any) -> Contestant:
    def build(config: ModelConfig) -> nn.Module:
        from timm.models import vision_transformer as timm_vit

        return timm_vit.VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            block_fn=getattr(timm_vit, block),
            **options,
        )

    return Contestant("timm", build, (block,), alike, note)


def _lucidrains(module: str, name: str, note: str) -> Contestant:
    """vit-pytorch's models, and mega-vit's, which is made like them."""

    def build(config: ModelConfig) -> nn.Module:
        model_class = getattr(importlib.import_module(module), name)
        names = ("image_size", "patch_size", "num_classes", "dim", "depth", "mlp_dim")
        sizes = {name: getattr(config, name) for name in names}
        model = model_class(heads=config.num_heads, dim_head=config.dim // config.num_heads, **sizes)
        if isinstance(getattr(model, "linear_head", None), nn.LayerNorm):  # a variant without a classifier
            model.linear_head = nn.Sequential(model.linear_head, nn.Linear(config.dim, config.num_classes))
        return model

    return Contestant(module.split(".")[0], build, ("Attention", "FeedForward"), False, note)


class _HuggingFace(nn.Module):
    """Hugging Face's classifier, returning logits alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        vit = ViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_labels=config.num_classes,
            attn_implementation="sdpa",
        )
        self.inner = ViTForImageClassification(vit)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).logits


_MAP = {"qk_norm": True, "qkv_bias": False, "class_token": False, "global_pool": "map"}
_MEAN = "mean pooling, "

CONTESTANTS = {
    "megavit": _ours("none", "this repository"),
    "megavit-selective": _ours("selective", "recomputes norms and GELU"),
    "megavit-full": _ours("full", "recomputes each block"),
    "timm-parallel": _timm("ParallelScalingBlock", True, "LayerNorm, erf GELU", **_MAP),
    "timm-parallel-tanh": _timm(
        "ParallelScalingBlock", True, "LayerNorm, our GELU (tanh)", **_MAP, act_layer="gelu_tanh"
    ),
    "timm-sequential": _timm("Block", True, "LayerNorm, erf GELU, sequential block", **_MAP),
    "timm-cls": _timm("Block", False, "no QK norm, class token, sequential block"),
    "vit-pytorch-flash": _lucidrains(
        "vit_pytorch.simple_flash_attn_vit", "SimpleViT", _MEAN + "no QK norm, fixed positions"
    ),
    "vit-pytorch-qk-norm": _lucidrains(
        "vit_pytorch.simple_vit_with_qk_norm", "SimpleViT", _MEAN + "explicit softmax; classifier added"
    ),
    "mega-vit": _lucidrains(
        "mega_vit.main", "MegaVit", "normalises K and V, class token, three norms a block"
    ),
    "hf-vit": Contestant("transformers", _HuggingFace, ("ViTLayer",), False, "no QK norm, class token, SDPA"),
}
REFERENCE = "timm-parallel"


def choose(names: Iterable[str] | None) -> tuple[dict[str, Contestant], list[str]]:
    """The contestants called `names` (None: all), and a line for each one whose package is not installed.

    Raises ValueError for an unknown name, and when none is left.
    """
    chosen, left_out = {}, []
    for name in CONTESTANTS if names is None else names:
        if name not in CONTESTANTS:
            raise ValueError(f"--models {name}: no such model; known: {', '.join(CONTESTANTS)}")
        contestant = CONTESTANTS[name]
        if importlib.util.find_spec(contestant.package):
            chosen[name] = contestant
        else:
            left_out.append(f"{name} needs {contestant.package}: pip install 'megavit[peers]'")
    if not chosen:
        raise ValueError(f"--models: none can be built; {'; '.join(left_out)}")
    return chosen, left_out
