"""The input of a run: typed, frozen, validated on construction. Imports the standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from megavit.fields import check_types, require_positive

Augment = Literal["inception", "scale", "none"]
_CHANGES = ("shift", "rotate_degrees", "zoom", "brightness", "contrast", "saturation")
_PILLOWS_PIXELS = 178_956_970  # twice PIL.Image.MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented.

    Args:
        shards: training shards: a manifest (data/train.manifest.json) or paths and urls with braces or, for
            local ones, wildcards, e.g. data/train-{000000..000099}.tar; http(s), s3, gs and pipe are fetched
            whole.
        val_shards: validation shards, same notation; empty trains without evaluation. Their results are
            logged as eval/val/*.
        val: more validation sets, each as NAME=SHARDS, or NAME@STEPS=SHARDS to evaluate it every so many
            steps instead of every eval_every, e.g. real@1000=data/real-{00..07}.tar; may be repeated. Their
            results are logged as eval/NAME/*.
        class_names: text file with the names of the classes, one a line in the order of the class ids; empty
            takes classes.txt beside the training shards, if there is one. The run folder and the export keep
            them.
        workers: decoding processes per rank; 0 decodes in the training process. Not given, there is one for
            each core that the rank has, and no more than 4.
        fraction: share of the training samples that the run reads, e.g. 1/16: every 16th of them, whatever
            the seed and the layout.
        augment: inception (random crop of crop_area of the image, aspect 3/4 to 4/3), scale (the image's
            short side becomes the model's side times a factor of scale_range, then a square is cropped, which
            is black, and unknown to masks and depth, where it reaches beyond the image), or none (the
            evaluation transform).
        crop_area: smallest and largest share of the image's area that the inception crop keeps.
        scale_range: smallest and largest factor of augment scale.
        flip: mirror half of the training images left to right.
        shift: move training images by up to this share of their side (black border); for tiny images.
        rotate_degrees: turn training images by up to this angle (black border); for tiny images.
        zoom: scale training images by 1 - zoom to 1 + zoom (black border); for tiny images.
        brightness: multiply training images by 1 - brightness to 1 + brightness; of this and the following
            three, 0 leaves it out, and they come in this order, as torchvision defines them.
        contrast: blend them with their mean grey, by 1 - contrast to 1 + contrast.
        saturation: blend them with their own grey, by 1 - saturation to 1 + saturation.
        hue: turn their hue by up to this share of the colour circle, at most 0.5.
        color_share: of the training images, the share in which each of the four is changed, independently.
        mixup: alpha of mixup's Beta(alpha, alpha) blend of neighbouring slots; 0 leaves it out.
        cutmix: alpha of cutmix, as mixup; with both, each pair of slots gets one or the other.
        eval_crop: share of the side kept by the evaluation's centre crop (0.875 is the ImageNet convention).
        antialias: low-pass before shrinking a crop; without it decoding is faster and images are harsher.
        decoder: full (libjpeg-turbo) or region (decodes the crop only; needs nvidia-nvimgcodec-cu13).
        max_labels: most labels of an image; one with more counts as bad.
        max_pixels: most pixels of an image by its header; one with more counts as bad. Decoding takes up to
            16 bytes a pixel (WebP; PNG 14, JPEG 3 to 14): 0.8 GB at the default.
        lanes: parallel streams of the order, fixed for a run; every global batch size it uses must be a
            multiple. 0 takes the greatest common divisor of the global batch and 1024.
        shuffle_block: samples that are shuffled among themselves within a lane.
        skip_steps: data to leave out, e.g. 12000:12100,15000:15050; after step 12000 the data jump ahead by
            100 steps, so that what steps 12001 to 12100 would have read is left out.
        allow_changed_manifest: go on with a saved run although its training shards have changed.
        tp: split (each rank of a TP group decodes its part and the group gathers the batch) or replicate
            (every rank decodes everything; no communication, compared every check_every steps).
        check_every: steps between two comparisons of the TP ranks' batches under tp replicate.
        max_bad_fraction: stop when more than this share of the samples seen was unusable, each counted once
            however many epochs read it (ten are free; with 0 none is).
        max_bad_shards: stop when more than so many shards fail as a whole, without a good step in between.
        allow_pipe: let a manifest name shell commands (pipe:COMMAND) as shards; those in shards and
            val_shards themselves need no permission.
        cache_dir: node-local folder for remote shards, shared by the node's ranks; empty takes
            megavit-shards-UID in $TMPDIR (/tmp), which only this user can open.
        cache_gb: size that the cache folder may have, in GB.
        timeout_s: seconds after which a stalled download, or a batch that does not come, is an error.
    """

    shards: str = ""
    val_shards: str = ""
    val: tuple[str, ...] = ()
    class_names: str = ""
    workers: int | None = None
    fraction: str | float = "1"
    augment: Augment = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    shift: float = 0.0
    rotate_degrees: float = 0.0
    zoom: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    color_share: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    eval_crop: float = 0.875
    antialias: bool = True
    decoder: Literal["full", "region"] = "full"
    max_labels: int = 32
    max_pixels: int = 50_000_000
    lanes: int = 0
    shuffle_block: int = 16_384
    skip_steps: str = ""
    allow_changed_manifest: bool = False
    tp: Literal["split", "replicate"] = "split"
    check_every: int = 100
    max_bad_fraction: float = 1e-3
    max_bad_shards: int = 8
    allow_pipe: bool = False
    cache_dir: str = ""
    cache_gb: float = 100.0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check_types(self, "data.")
        low, high = self.crop_area
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"data.crop_area must satisfy 0 < smallest <= largest <= 1, got [{low}, {high}]")
        if not 0.0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(
                f"data.scale_range must satisfy 0 < smallest <= largest, got {list(self.scale_range)}"
            )
        if self.hue > 0.5:
            raise ValueError(f"data.hue is a share of the colour circle, at most 0.5, got {self.hue}")
        if not 0.0 <= self.color_share <= 1.0:
            raise ValueError(f"data.color_share must lie in [0, 1], got {self.color_share}")
        _ = self.share
        if not 0.0 < self.eval_crop <= 1.0:
            raise ValueError(f"data.eval_crop must lie in (0, 1], got {self.eval_crop}")
        for name in (*_CHANGES, "hue", "mixup", "cutmix", "workers", "lanes", "max_bad_shards"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"data.{name} cannot be negative, got {getattr(self, name)}")
        require_positive("data.", self, "max_labels", "shuffle_block", "check_every")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ValueError(f"data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")
        for name in ("cache_gb", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.max_pixels <= _PILLOWS_PIXELS:
            raise ValueError(
                f"data.max_pixels must lie in 1 to {_PILLOWS_PIXELS}, where Pillow refuses images, got "
                f"{self.max_pixels}"
            )
        _step_ranges(self.skip_steps)
        names = [one.name for one in self.val_sets]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"data.val has two validation sets called {repeated[0]!r}; rename one")

    @property
    def share(self) -> Fraction:
        """`fraction` as a number."""
        try:
            share = Fraction(str(self.fraction))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"data.fraction must be a share such as 1/16 or 0.25, got {self.fraction!r}"
            ) from error
        if not 0 < share <= 1:
            raise ValueError(f"data.fraction must lie in (0, 1], got {self.fraction}")
        return share

    @property
    def augmented(self) -> tuple[str, ...]:
        """The fields that make a training image another one each time it is read."""
        found = [name for name in (*_CHANGES, "hue", "mixup", "cutmix", "flip") if getattr(self, name)]
        return (*(["augment"] if self.augment != "none" else []), *found)

    @property
    def val_sets(self) -> tuple[ValidationSet, ...]:
        """`val_shards`, which is called val, and those of `val`."""
        first = (ValidationSet("val", self.val_shards, None),) if self.val_shards else ()
        return (*first, *(_validation_set(text) for text in self.val))

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """`skip_steps` as ranges (A, B), ascending."""
        return _step_ranges(self.skip_steps)


@dataclass(frozen=True)
class ValidationSet:
    """Shards that are evaluated on every `every` steps, or, if None, every `eval_every` of the run."""

    name: str
    shards: str
    every: int | None


def _validation_set(text: str) -> ValidationSet:
    match = re.fullmatch(r"([\w.-]+)(?:@(\d+))?=(.+)", text)
    if not match:
        raise ValueError(f"data.val must be NAME=SHARDS or NAME@STEPS=SHARDS, got {text!r}")
    return ValidationSet(match[1], match[3], int(match[2]) if match[2] else None)


def _step_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """`A:B,C:D` as ranges, ascending. ValueError for anything but A < B, and ranges that overlap."""
    ranges = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(
                f"data.skip_steps must be A:B[,C:D...] with A < B, e.g. 12000:12100, got {part!r}"
            )
        ranges.append((int(first), int(last)))
    ranges.sort()
    for one, following in pairwise(ranges):
        if following[0] < one[1]:
            raise ValueError(f"data.skip_steps: {one[0]}:{one[1]} and {following[0]}:{following[1]} overlap")
    return tuple(ranges)
