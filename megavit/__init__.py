"""MegaViT: a trainer for very large vision transformers (ViT-22B, arXiv 2302.05442) on PyTorch and
DeepSpeed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megavit.model.config import PRESETS, ModelConfig
from megavit.train.config import RunConfig

if TYPE_CHECKING:
    from megavit.explain.explainer import explain
    from megavit.model.vit import MegaVit
    from megavit.predictor import load

__version__ = "0.1.0"
__all__ = ["PRESETS", "MegaVit", "ModelConfig", "RunConfig", "__version__", "explain", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `launch/train.py --help` and the launcher's checks need not import torch.
    if name == "MegaVit":
        from megavit.model.vit import MegaVit

        return MegaVit
    if name == "load":
        from megavit.predictor import load

        return load
    if name == "explain":  # the package, which is a function too
        return importlib.import_module("megavit.explain")
    raise AttributeError(f"module 'megavit' has no attribute {name!r}")
