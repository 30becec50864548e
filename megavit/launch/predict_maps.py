"""Maps of photos by a model of depth or segmentation, into files: what launch/predict.py does with such a
model.

Letters: H and W the sides of a photo.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from megavit.dense_predictor import DensePredictor
from megavit.launch.predict import Misses, inference_of, photos_of, print_line
from megavit.predictor import load
from megavit.tasks.config import DenseConfig, DepthConfig, InferenceConfig
from megavit.tasks.dense import shown_classes, shown_values

_KINDS = (".png", ".npy")
_SCALES = (1 / 1000, 1 / 256)  # metres of the number 1: NYU's and KITTI's
_LARGEST = (1 << 16) - 1


def maps_job(task: DenseConfig, arguments: argparse.Namespace) -> Callable[[], int]:
    """What writes the map of each photo, and returns the exit status. ValueError or OSError, before the
    weights are read, if the options do not fit the model, the photos or each other."""
    inference = InferenceConfig(**inference_of(arguments))
    if arguments.color and not isinstance(task, DepthConfig):
        raise ValueError("--color is for depth: the PNG of classes is in colours already")
    misses = Misses()
    targets = _targets(photos_of(arguments.photos, misses), arguments.out)
    predictor = load(arguments.folder, arguments.device, arguments.dtype, inference=inference)
    assert isinstance(predictor, DensePredictor)
    return functools.partial(_write_maps, predictor, targets, arguments, misses)


def _targets(photos: list[tuple[Path, Path]], out: Path | None) -> list[tuple[Path, Path]]:
    """The file of each photo's map. ValueError if two share one, or one is a photo itself."""
    if out is None:
        raise ValueError("this model writes maps: say where with --out map.png, map.npy, or a folder")
    is_file = out.suffix.lower() in _KINDS and not out.is_dir()
    if out.suffix and not is_file and not out.is_dir():
        raise ValueError(f"--out {out}: a map is written as .png or .npy; a new folder must have no dot")
    if is_file and len(photos) > 1:
        raise ValueError(f"--out {out} is one file for {len(photos)} photos; name a folder")
    found = [(photo, out if is_file else (out / name).with_suffix(".png")) for photo, name in photos]
    owners: dict[Path, Path] = {}
    inputs = {photo.resolve() for photo, _ in photos}
    for photo, target in found:
        if (other := owners.setdefault(target, photo)) != photo:
            raise ValueError(f"{other} and {photo} would both be written to {target}; predict them apart")
        if target.resolve() in inputs:
            raise ValueError(f"--out {out} would write over the photo {target}; choose another")
    return found


def _write_maps(
    predictor: DensePredictor, targets: list[tuple[Path, Path]], arguments: argparse.Namespace, misses: Misses
) -> int:
    for photo, target in targets:
        try:
            found = predictor.predict(predictor.fit(photo)).cpu()
            target.parent.mkdir(parents=True, exist_ok=True)
            if predictor.kind == "depth":
                row = _write_depth(found, target, predictor, color=arguments.color)
            else:
                row = _write_classes(found, target, predictor.names, arguments.top)
        except (ValueError, OSError) as error:
            misses.add(photo, error)
            continue
        row = {"file": str(photo), "out": str(target), **row}
        print_line(json.dumps(row) if arguments.json else f"{photo}  {target}  {_in_words(row)}")
    return 1 if misses.count else 0


def _write_depth(metres: Tensor, target: Path, predictor: DensePredictor, *, color: bool) -> dict[str, Any]:
    """Write metres [H, W], and say what is in them."""
    assert predictor.limits
    low, high = float(metres.min()), float(metres.max())
    row: dict[str, Any] = {"min_m": round(low, 4), "max_m": round(high, 4)}
    if target.suffix.lower() == ".npy":
        np.save(target, metres.numpy())
    else:
        row["scale"] = scale = depth_scale(predictor.limits[1])
        numbers = (metres.double() / scale).round().clamp(1, _LARGEST).numpy().astype(np.uint16)
        about = {"scale": repr(scale), "Description": f"depth in metres is the number times {scale!r}"}
        _save_png(Image.fromarray(numbers), target, about)
    if color:
        shown = shown_values(metres, torch.ones_like(metres, dtype=torch.bool), low, high)
        about = {"Description": f"depth from {low:.4g} m (dark) to {high:.4g} m (bright)"}
        _save_png(Image.fromarray(_in_8_bits(shown)), target.with_suffix(".color.png"), about)
    return row


def depth_scale(max_m: float) -> float:
    """The metres that the number 1 of a 16-bit PNG stands for: a millimetre, or else 1/256 m, or else what
    makes `max_m` the largest number."""
    return next((scale for scale in _SCALES if max_m <= scale * _LARGEST), max_m / _LARGEST)


def _write_classes(classes: Tensor, target: Path, names: tuple[str, ...], top: int) -> dict[str, Any]:
    """Write class numbers [H, W], and say which there are most of."""
    if target.suffix.lower() == ".npy":
        np.save(target, classes.numpy())
    else:
        image = Image.fromarray(classes.numpy(), "P")
        palette = _in_8_bits(shown_classes(torch.arange(256)[None], len(names)))
        image.putpalette(palette.tobytes())
        _save_png(image, target, {"classes": json.dumps(names)})
    counts = classes.flatten().long().bincount(minlength=len(names))
    shares = (counts / classes.numel()).tolist()
    most = [n for n in counts.argsort(descending=True, stable=True).tolist() if shares[n]][:top]
    return {"classes": [{"class": n, "name": names[n], "share": round(shares[n], 4)} for n in most]}


def _in_words(row: dict[str, Any]) -> str:
    if "classes" in row:
        return "  ".join(f"{100 * one['share']:.1f}% {one['name']}" for one in row["classes"])
    scale = f", numbers times {row['scale']:g} are metres" if "scale" in row else ""
    return f"{row['min_m']:.4g} to {row['max_m']:.4g} m{scale}"


def _in_8_bits(picture: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _save_png(image: Image.Image, path: Path, texts: dict[str, str]) -> None:
    about = PngInfo()
    for name, text in texts.items():
        about.add_itxt(name, text) if not text.isascii() else about.add_text(name, text)
    image.save(path, "PNG", pnginfo=about)
