"""How a photo becomes a model's input, and its outputs probabilities: `preprocessing.json` of an export.

It says in numbers what `eval_box`, `Decoder` and `to_model_input` do with a run's validation images, for
those who use the model with this package or without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavit.data.json_data import parse_json
from megavit.fields import check_types

PREPROCESSING_FILE = "preprocessing.json"
FORMAT = 1
Link = Literal["softmax", "sigmoid", "none"]
_PerChannel = tuple[float] | tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """From a photo to the model's input, and from its outputs to probabilities.

    Args:
        image_size: pixels of a side of the input.
        channels: 1 (grey) or 3 (RGB).
        crop: share of the short side that the central square keeps, which is then resized to image_size.
        interpolation: how it is resized: bilinear, or bicubic, with antialias, as torchvision and timm do
            with Pillow.
        antialias: whether shrinking averages over the pixels that an output pixel covers.
        mean: of each channel, subtracted from pixels in [0, 1].
        std: of each channel, by which they are then divided.
        link: what makes probabilities of the outputs: softmax, or sigmoid (one yes or no for each class);
            none says that they are no logits of classes.
    """

    image_size: int
    channels: int
    crop: float
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: _PerChannel
    std: _PerChannel
    link: Link

    def __post_init__(self) -> None:
        check_types(self)
        if self.image_size < 1 or self.channels not in (1, 3):
            raise ValueError(
                f"images must have a positive size and 1 or 3 channels, got image_size {self.image_size} and "
                f"channels {self.channels}"
            )
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f"crop must lie in (0, 1], got {self.crop}")
        if self.interpolation == "bicubic" and not self.antialias:
            raise ValueError("interpolation bicubic needs antialias true")
        if not len(self.mean) == len(self.std) == self.channels or not all(std > 0 for std in self.std):
            raise ValueError(
                f"mean and std must have {self.channels} numbers, one for each channel, and those of std be "
                f"positive, got {list(self.mean)} and {list(self.std)}"
            )

    @staticmethod
    def of_run(run: Mapping[str, Any]) -> Preprocessing:
        """What a run does, from its plain configuration (`plain_config`). ValueError for one that lacks the
        fields or has others than this version reads."""
        try:
            model, data = run["model"], run["data"]
            task = run.get("task")
            loss = run["loss"] if "loss" in run else task.get("loss") if isinstance(task, Mapping) else None
            half: Any = (0.5,) * model["channels"]
            return Preprocessing(
                image_size=model["image_size"],
                channels=model["channels"],
                crop=data["eval_crop"],
                interpolation="bilinear",
                antialias=data["antialias"],
                mean=half,
                std=half,
                link=loss if loss in ("softmax", "sigmoid") else "none",
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the run's configuration lacks a field or has a wrong one: {error}") from error

    @staticmethod
    def read(folder: Path) -> Preprocessing:
        """Of an export. ValueError naming the file, with what to do, if it is missing or none."""
        path = folder / PREPROCESSING_FILE
        try:
            found = parse_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: this export, of an earlier version, does not say how photos are cropped "
                f"and what its outputs mean. Write it again with python launch/export.py RUN_DIR {folder}"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            return _from_json(found)
        except ValueError as error:
            raise ValueError(f"{path} is no description of the images of a model: {error}") from error

    def write(self, path: Path) -> None:
        """Write the JSON object that `read` reads."""
        path.write_text(json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n")


def _from_json(found: Any) -> Preprocessing:
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    version = found.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"its format is {version}, this version of megavit reads {FORMAT}")
    names = {field.name for field in dataclasses.fields(Preprocessing)}
    if other := sorted(names ^ found.keys()):
        raise ValueError(f"it lacks, or has unknown, fields: {', '.join(other)}")
    return Preprocessing(**found)
