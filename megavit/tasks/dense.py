"""What tasks with a decoder share, the trunk and a head on the tokens of its blocks, and what those on every
pixel do: what planes mean, and how maps are shown.

Letters: b micro-batch, S image side, K outputs of the head.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megavit.data.plane_facts import PlaneFacts, planes_beside
from megavit.model.dense import DenseHead
from megavit.model.vit import MegaVit
from megavit.tasks.config import DecoderConfig, DenseConfig
from megavit.tasks.feature_cache import FeatureCache, check_space
from megavit.tasks.task import Task, Training

TASK_FILE = "task.json"  # in a run folder and an export: the task's configuration, with what the data say


class DecoderTask(Task):
    """A task whose run folder and export say what it is, in `task.json`."""

    config: DecoderConfig
    _kept: dict[str, Any] | None = None  # on the main rank: what the run folder says

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        kept = run_dir / TASK_FILE
        if kept.is_file():
            self._kept = json.loads(kept.read_text())

    def keep(self, folder: Path) -> None:
        found = self.resolved() if self._kept is None or self.data.shards else self._kept
        (folder / TASK_FILE).write_text(json.dumps(found, indent=2) + "\n")

    def resolved(self) -> dict[str, Any]:
        """The configuration, with what the data say."""
        return dataclasses.asdict(self.config)


class DenseTask(DecoderTask):
    """A task on a plane of the samples called `plane`."""

    config: DenseConfig
    plane = ""

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        data, facts = self.data, self.facts()
        for one in data.val_sets if data.shards else ():
            theirs = planes_beside(one.shards).get(self.plane, facts)
            if (theirs.scale, theirs.invalid) != (facts.scale, facts.invalid):
                raise ValueError(
                    f"the planes {self.plane} of {one.shards} do not count as those of {data.shards} "
                    f"({theirs} and {facts}): write both in one unit"
                )
        super().open(run_dir, class_names)

    def reserve(self, num_samples: int, dtype: torch.dtype) -> None:
        config = self.config
        if config.cache_features:
            limit = int(config.cache_gb * 1e9)
            check_space(Path(config.cache_features), num_samples, self._row_shape(), dtype, limit)

    def begin(self, module: nn.Module, training: Training) -> None:
        config = self.config
        if not config.cache_features:
            return
        assert isinstance(module, DenseModule)
        trunk = module.trunk
        key = {
            "weights": training.frozen,
            "data": training.data,
            "architecture": dataclasses.asdict(trunk.config),
            "picture": dataclasses.asdict(self.picture()) | {"eval_crop": self.data.eval_crop},
            "layers": module.wanted,
            "norm_taps": config.norm_taps,
        }
        folder = Path(config.cache_features)
        shape, dtype = self._row_shape(), trunk.dtype
        module.cache = FeatureCache(folder, key, training.num_samples, shape, dtype, trunk.mesh)

    def _row_shape(self) -> tuple[int, int, int, int]:
        """What the trunk makes of a picture: maps, channels, rows, columns."""
        grid = self.model.grid_size
        return len({*self.config.taps(self.model.depth)}), self.model.dim, grid, grid

    def facts(self) -> PlaneFacts:
        """What `dense.json` beside the training shards says of the plane; nothing if there is none."""
        return planes_beside(self.data.shards).get(self.plane, PlaneFacts())


class DecoderModule(nn.Module):
    """The trunk and a head (`decoder`) on the tokens of the blocks `layers`."""

    def __init__(self, trunk: MegaVit, decoder: nn.Module, layers: Sequence[int], norm_taps: bool):
        super().__init__()
        self.trunk, self.decoder = trunk, decoder
        self.layers, self.norm_taps = tuple(layers), norm_taps

    @property
    def wanted(self) -> list[int]:
        """The blocks that are read, each once, ascending."""
        return sorted({*self.layers})

    def run_trunk(self, images: Tensor, output_fmt: Literal["NCHW", "NLC"] = "NCHW") -> list[Tensor]:
        """The patch tokens of images [b, C, S, S] after each of the blocks that are `wanted`. A frozen trunk
        keeps nothing for backward."""
        trunk = self.trunk
        trained = any(parameter.requires_grad for parameter in trunk.parameters())
        with nullcontext() if trained or images.requires_grad else torch.no_grad():
            found: list[Tensor] = trunk.forward_intermediates(
                images.to(trunk.dtype),
                self.wanted,
                norm=self.norm_taps,
                output_fmt=output_fmt,
                intermediates_only=True,
            )
        return found

    def taps(self, found: Sequence[Tensor]) -> list[Tensor]:
        """What `run_trunk` gives, for each of `layers`."""
        by_layer = dict(zip(self.wanted, found, strict=True))
        return [by_layer[layer] for layer in self.layers]


class DenseModule(DecoderModule):
    """The trunk and a dense head."""

    decoder: DenseHead
    cache: FeatureCache | None = None

    def maps(self, images: Tensor, weights: Tensor, numbers: Tensor | None = None) -> Tensor:
        """The head's output of images [b, C, S, S], float32 [b, K, S, S]; those of weight 0 (`weights` [b])
        leave the others as they are. In training the trunk is not run if there is a cache that has what it
        makes of all samples `numbers` [b]."""
        found = None
        if self.training and self.cache is not None and numbers is not None:
            found = self.cache.read(numbers, weights)
            if found is None:
                found = self.run_trunk(images)
                self.cache.write(numbers, weights, found)
        maps: Tensor = self.decoder(self.taps(found or self.run_trunk(images)), weights)
        return maps


def num_shown(weights: Tensor, most: int) -> int:
    """How many samples of a micro-batch are shown: at most `most`, one at least, and none of the empty places
    at the end of a short last batch, whose `weights` [b] are 0."""
    usable = weights.nonzero()
    filled = int(usable[-1]) + 1 if len(usable) else 1
    return max(1, min(most, filled))


# Colours from low to high that differ in lightness too (points of matplotlib's viridis).
_RAMP = (
    (0.267, 0.005, 0.329),
    (0.230, 0.322, 0.546),
    (0.128, 0.567, 0.551),
    (0.369, 0.789, 0.383),
    (0.993, 0.906, 0.144),
)


def shown_values(values: Tensor, valid: Tensor, low: float, high: float) -> Tensor:
    """Numbers [S, S] as colours [3, S, S] from `low` to `high`; black where not `valid`."""
    ramp = torch.tensor(_RAMP, device=values.device)
    at = ((values.float() - low) / max(high - low, 1e-9)).nan_to_num().clamp(0, 1) * (len(_RAMP) - 1)
    below = at.floor().long().clamp(max=len(_RAMP) - 2)
    colors = torch.lerp(ramp[below], ramp[below + 1], (at - below)[..., None])
    return (colors * valid[..., None]).permute(2, 0, 1)


def shown_classes(classes: Tensor, num_classes: int) -> Tensor:
    """Class numbers [S, S] as colours [3, S, S], neighbouring numbers in unlike ones; black for others."""
    numbers = torch.arange(num_classes, device=classes.device)
    hue, light = numbers * 0.618034 % 1, 0.55 + 0.45 * (numbers * 0.754878 % 1)
    shift = torch.tensor([0.0, 2 / 3, 1 / 3], device=classes.device)
    wheel = (((hue[:, None] + shift) % 1 * 6 - 3).abs() - 1).clamp(0, 1)
    colors = (0.15 + 0.85 * wheel) * light[:, None]
    known = (classes >= 0) & (classes < num_classes)
    return (colors[torch.where(known, classes, 0).long()] * known[..., None]).permute(2, 0, 1)


def shown_picture(image: Tensor) -> Tensor:
    """A model input [C, S, S] as a picture [3, S, S] in [0, 1]."""
    picture = (image.float() + 1) / 2
    return picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
