"""A model of timm in the place of one of ours, so that a table can have rows that people know.

Letters: b images, S image side, C channels, D width of the features, K classes.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megavit.data.device import normalised
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.sets.image_set import digest_of
from megavit.evaluate.sets.imagenet_classes import NUM_CLASSES, imagenet_names
from megavit.parallel.mesh import Mesh

PREFIX = "timm:"
_RANDOM = "none"  # in the place of a weights file
_SEED = 22
_BLOCK = "block."


class TimmModel:
    """A pretrained model of timm, in evaluation mode.

    Its layers are `pooled` (what its classifier reads), `patches` (the mean of the last patch tokens, or of
    the places of a convolutional network's last map) and `block.K` (the same mean after block K, from 0 on,
    under the final norm where timm's `forward_intermediates` applies one). Where a model has stages in the
    place of blocks, as convolutional networks and hierarchical transformers do, K counts those.

    Attributes:
        name: the specification; of random weights it says that they are.
        digest: of the weights as they were loaded, the architecture and the transform.
        preprocessing: timm's transform for this model, with its interpolation; link is softmax.
        num_classes: 0 for a model without a classifier. `class_names` are ImageNet's if they are 1000, and
            else numbers.
        depth: blocks, or stages; 0 if timm cannot give their outputs.
    """

    def __init__(self, model: Any, spec: str, mesh: Mesh, dtype: torch.dtype):
        """Use `open`. ValueError for a model with a transform or classifier of no kind that is known here."""
        random = spec.endswith(f"@{_RANDOM}")
        self.name = f"{spec.removesuffix('@' + _RANDOM)} (random weights)" if random else spec
        self.preprocessing = _preprocessing(model, spec)
        self.digest = digest_of(_digest(model, self.preprocessing), dtype)
        self.mesh, self.device, self.dtype = mesh, mesh.device, dtype
        self._model = model.to(mesh.device, dtype).eval().requires_grad_(False)
        classifier = self._model.get_classifier()
        self.num_classes = 0 if isinstance(classifier, nn.Identity) else int(model.num_classes)
        self.class_names = _class_names(self.num_classes)
        self.depth = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
        if self.num_classes:
            self._check_classifier()

    @staticmethod
    def open(spec: str, mesh: Mesh, dtype: torch.dtype = torch.float32) -> TimmModel:
        """The model that `spec` names, on the mesh's device, whole on every rank.

        timm:NAME is a name of timm, e.g. timm:vit_base_patch16_224.augreg_in21k, with its weights from the
        cache of Hugging Face's hub or from the network; timm:NAME@FILE has them from a .safetensors or .pth
        file, whose classifier may have any number of classes; timm:NAME@none has random weights, always the
        same.

        ValueError for all that can be wrong: no timm, an unknown name, weights that are not to be had or do
        not fit, a classifier that is not a layer on the pooled features.
        """
        name, _, weights = spec.removeprefix(PREFIX).partition("@")
        timm = _timm()
        _check_name(timm, name)
        if weights == _RANDOM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                model = timm.create_model(name)
        else:
            model = _from_file(timm, name, Path(weights)) if weights else _pretrained(timm, name)
        return TimmModel(model, spec, mesh, dtype)

    @torch.no_grad()
    def features(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """uint8 [b, S, S, C] -> each layer's float32 [b, D], on the device. ValueError for a layer that the
        model does not have."""
        blocks = sorted({self._block(layer) for layer in layers if layer not in ("pooled", "patches")})
        images = self._normalised(pixels)
        found: dict[str, Tensor] = {}
        if blocks:
            last, maps = self._model.forward_intermediates(images, indices=blocks, norm=True)
            found = {f"{_BLOCK}{k}": each.mean((2, 3)).float() for k, each in zip(blocks, maps, strict=True)}
        else:
            last = self._model.forward_features(images)
        if "pooled" in layers:
            found["pooled"] = self._model.forward_head(last, pre_logits=True).float()
        if "patches" in layers:
            found["patches"] = self._mean_of_patches(last)
        return {layer: found[layer] for layer in layers}

    @torch.no_grad()
    def logits(self, pooled: Tensor) -> Tensor:
        """float32 [b, D] -> float32 [b, K]. ValueError if the model has no classifier."""
        if not self.num_classes:
            raise ValueError(f"{self.name} has no classifier: it has features and no logits")
        return self._model.get_classifier()(pooled.to(self.device, self.dtype)).float()

    def _normalised(self, pixels: Tensor) -> Tensor:
        """[b, S, S, C] -> [b, C, S, S]."""
        used = self.preprocessing
        return normalised(pixels, used.mean, used.std, self.device).to(self.dtype)

    def _block(self, layer: str) -> int:
        number = layer.removeprefix(_BLOCK)
        if not (layer.startswith(_BLOCK) and number.isdecimal() and int(number) < self.depth):
            blocks = f", {_BLOCK}0 to {_BLOCK}{self.depth - 1}" if self.depth else ""
            raise ValueError(f"{self.name} has no layer {layer!r}; it has pooled, patches{blocks}")
        return int(number)

    def _mean_of_patches(self, last: Tensor) -> Tensor:
        """[b, N, D], [b, D, rows, columns] or [b, rows, columns, D] -> float32 [b, D]."""
        if last.ndim == 2:  # it has been pooled
            return last.float()
        if last.ndim == 3:
            last = last[:, getattr(self._model, "num_prefix_tokens", 0) :]
            return last.mean(1, dtype=torch.float32)
        channels_last = getattr(self._model, "output_fmt", "NCHW") == "NHWC"
        return last.mean((1, 2) if channels_last else (2, 3), dtype=torch.float32)

    @torch.no_grad()
    def _check_classifier(self) -> None:
        """ValueError unless `logits` of the pooled features are what the model itself says."""
        used = self.preprocessing
        shape = (2, used.image_size, used.image_size, used.channels)
        noise = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(_SEED)
        )
        whole = self._model(self._normalised(noise))
        try:
            found = self.logits(self.features(noise, ["pooled"])["pooled"])
        except (RuntimeError, TypeError):  # there are several classifiers, or one that takes maps
            found = torch.empty(0)
        if found.shape == whole.shape:
            bound = (1e-4 if self.dtype == torch.float32 else 0.05) * max(1.0, float(whole.abs().max()))
            if float((found - whole.float()).abs().max()) <= bound:
                return
        raise ValueError(
            f"{self.name}: its outputs are not one classifier on its pooled features (get_classifier() on "
            f"forward_head(pre_logits=True)), so it cannot be evaluated here"
        )


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError(
            "a model timm:NAME needs timm, which is not here: pip install megavit[timm]"
        ) from error
    return timm


def _check_name(timm: Any, name: str) -> None:
    """ValueError for a name that timm does not have; those of a hub or a folder are its own business."""
    if ":" in name or (timm.is_model(name) and ("." not in name or name in timm.list_pretrained())):
        return
    known = [*timm.list_models(), *timm.list_pretrained()]
    near = difflib.get_close_matches(name, known, 5, 0.5)
    raise ValueError(
        f"timm {timm.__version__} has no model {name!r}"
        + (f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() lists them")
    )


def _pretrained(timm: Any, name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # of urllib, requests, httpx, the hub, timm
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"the weights of timm:{name} are not in the cache and could not be downloaded ({why}). "
            f"Where there is a network, python -c \"import timm; timm.create_model('{name}', True)\" puts "
            f"them into the cache (HF_HOME); or give a file: timm:{name}@FILE"
        ) from error


def _from_file(timm: Any, name: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"timm:{name}@{path}: there is no such file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        last = timm.get_pretrained_cfg(name).classifier or ""
        weight = state.get(f"{last if isinstance(last, str) else last[0]}.weight")
        classes = 0 if weight is None else len(weight)
        overlay = {"state_dict": dict(state), "num_classes": classes}
        return timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of torch, pickle, safetensors, timm
        what = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of timm:{name}: {what[:300]}") from error


def _preprocessing(model: nn.Module, spec: str) -> Preprocessing:
    import timm

    found = timm.data.resolve_model_data_config(model)
    channels, height, width = found["input_size"]
    if height != width or channels not in (1, 3):
        raise ValueError(
            f"{spec} takes {channels} x {height} x {width} pixels; a square of 1 or 3 is supported"
        )
    if found["interpolation"] not in ("bilinear", "bicubic"):
        raise ValueError(f"{spec} resizes {found['interpolation']}; bilinear and bicubic are supported")
    if found["crop_mode"] != "center":
        warnings.warn(
            f"{spec} expects whole photos (crop_mode {found['crop_mode']}); it gets their central square",
            stacklevel=2,
        )
    mean, std = (cast(Any, tuple(map(float, found[key]))) for key in ("mean", "std"))
    # timm makes the short side so many whole pixels, and cuts the square out of that.
    short_side = math.floor(height / found["crop_pct"])
    return Preprocessing(
        image_size=height,
        channels=channels,
        crop=min(1.0, height / short_side),
        interpolation=found["interpolation"],
        antialias=True,
        mean=mean,
        std=std,
        link="softmax",
    )


def _class_names(num_classes: int) -> tuple[str, ...]:
    return imagenet_names() if num_classes == NUM_CLASSES else tuple(map(str, range(num_classes)))


def _digest(model: nn.Module, preprocessing: Preprocessing) -> str:
    cfg: Any = model.pretrained_cfg
    found = blake2b(f"{cfg.get('architecture')} {preprocessing}".encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
