"""Depth in metres of every pixel, on a frozen or trained trunk.

Letters: b micro-batch, S image side, C channels, K outputs of the head (1, or the number of bins).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megavit.data.device import to_model_input
from megavit.data.fields import Field, Plane
from megavit.data.plane_facts import planes_beside
from megavit.model.config import Recompute
from megavit.model.dense import DenseHead, DptHead, LinearHead
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import DepthConfig
from megavit.tasks.dense import DenseModule, DenseTask, num_shown, shown_picture, shown_values
from megavit.tasks.dense_loss import gradient_error, silog_error, squared_error
from megavit.tasks.metrics import crop_mask, depth_metrics, per_image
from megavit.tasks.task import AnyBatch, DeviceBatch, Pictures, Sums

_MAX_M = 10.0
_NUM_BINS = 256
_DPT_WIDTH = 256
_WORST_SHOWN = 0.5  # relative error of the brightest colour


class Inputs(NamedTuple):
    """One micro-batch on the device, the same on all ranks of a TP group."""

    images: Tensor  # float32 [b, C, S, S] in [-1, 1]
    metres: Tensor  # float32 [b, S, S], 0 where it is not known
    weights: Tensor  # float32 [b]
    numbers: Tensor | None = None  # int64 [b], in training: where each sample comes in the shards


class Depth(DenseTask):
    """Trains a dense head for depth. The unit is an image with a pixel whose depth is known and between
    `min_m` and `max_m`: losses and errors are means over its pixels, and then over images.

    Evaluations see the square that the model does; `crop` is taken of that.
    """

    Config = DepthConfig
    config: DepthConfig
    plane = "depth"
    metric = "abs_rel"

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        super().open(run_dir, class_names)
        shards = self.data.shards
        if shards and self.config.scale is None and self.plane not in planes_beside(shards):
            raise ValueError(
                f"nothing says how many metres a number in the depth files of {shards} is: give --task.scale "
                f"(0.001 for millimetres, 1 for metres), or a dense.json beside the shards"
            )

    def resolved(self) -> dict[str, Any]:
        return super().resolved() | {"max_m": self.limits()[1]}

    def limits(self) -> tuple[float, float]:
        """The least and the largest depth that count, in metres."""
        return self.config.min_m, self.config.max_m or self.facts().max_m or _MAX_M

    def fields(self) -> Sequence[Field]:
        config, facts = self.config, self.facts()
        depth = Plane(
            "depth",
            ("depth.png", "depth.npy"),
            size=self.model.image_size,
            scale=facts.scale if config.scale is None else config.scale,
            invalid=config.invalid if config.invalid is not None else facts.invalid or 0,
            allow_empty=False,
            negative=False,
            png_bits=16,
        )
        return [self.picture(), depth]

    def build(self, init: Initializer, recompute: Recompute) -> nn.Module:
        config, model, scope = self.config, self.model, init.scope("decoder")
        decoder: DenseHead
        if config.head == "dpt":
            decoder = DptHead(model.dim, 1, model.patch_size, config.head_width or _DPT_WIDTH, scope)
        else:
            outputs = _NUM_BINS if config.head == "bins" else 1
            decoder = LinearHead(model.dim, outputs, model.patch_size, scope)
        layers = config.taps(model.depth)
        return DepthModule(self.trunk(init, recompute), decoder, layers, config, self.limits())

    def inputs(self, samples: DeviceBatch, mesh: Mesh, *, training: bool) -> Inputs:
        images = to_model_input(samples.fields["image"], mesh.device)
        return Inputs(images, samples.fields["depth"], samples.weights, samples.numbers)

    def weight(self, samples: AnyBatch) -> Tensor:
        return known_depth(samples.fields["depth"], self.limits()).flatten(1).any(1).float().sum()

    def results(self, sums: Mapping[str, Tensor], units: float) -> dict[str, float]:
        return per_image(sums) | {"loss": float(sums["loss"]) / max(units, 1.0)}

    def pictures(
        self, samples: DeviceBatch, inputs: Inputs, count: int, module: nn.Module | None = None
    ) -> Pictures:
        count = num_shown(inputs.weights, count // 4)
        images, truth, weights = (part[:count] for part in inputs[:3])
        known = known_depth(truth, self.limits())
        predicted = module.metres(images, weights) if isinstance(module, DepthModule) else None
        shown: list[Tensor] = []
        captions: list[str] = []
        for number, (image, true, valid) in enumerate(zip(images, truth, known, strict=True)):
            some = true[valid] if valid.any() else torch.tensor([0.0, 1.0])
            low, high = float(some.min()), float(some.max())
            shown += [shown_picture(image), shown_values(true, valid, low, high)]
            captions += ["input", f"depth {low:.2f} to {high:.2f} m"]
            if predicted is not None:
                error = (predicted[number] - true).abs() / true.clamp(min=1e-6)
                everywhere = torch.ones_like(valid)
                shown.append(shown_values(predicted[number], everywhere, low, high))
                shown.append(shown_values(error, valid, 0.0, _WORST_SHOWN))
                mean = float(error[valid].mean()) if valid.any() else 0.0
                captions += ["prediction", f"error {mean:.1%}\nbrightest: {_WORST_SHOWN:.0%}"]
        return Pictures(torch.stack([picture.cpu() for picture in shown]), captions)


def known_depth(metres: Tensor, limits: tuple[float, float]) -> Tensor:
    """bool [b, S, S]: the pixels whose depth is known and counts."""
    return (metres > limits[0]) & (metres < limits[1])


class DepthModule(DenseModule):
    """The trunk, a dense head, and the loss of its depth."""

    def __init__(
        self,
        trunk: MegaVit,
        decoder: DenseHead,
        layers: Sequence[int],
        config: DepthConfig,
        limits: tuple[float, float],
    ):
        super().__init__(trunk, decoder, layers, config.norm_taps)
        self.config, self.limits = config, limits

    def forward(self, inputs: Inputs) -> Sums:
        config, truth = self.config, inputs.metres
        valid = known_depth(truth, self.limits)  # of unusable samples none: they are filled with 0
        codes = self._codes(inputs.images, inputs.weights, inputs.numbers)
        errors = torch.where(valid, codes - self._code(torch.where(valid, truth, 1.0)), 0.0)
        if config.loss == "log1p":
            losses = squared_error(errors, valid)
        else:
            losses = silog_error(errors, valid, config.silog_lambda)
        if config.gradient:
            losses = losses + config.gradient * gradient_error(errors, valid)
        metrics = {} if self.training else self._metrics(codes, truth, valid)
        return Sums(losses.sum(), metrics)

    def metres(self, images: Tensor, weights: Tensor) -> Tensor:
        """Depth [b, S, S] in metres, within the limits."""
        return self._decode(self._codes(images, weights))

    def _codes(self, images: Tensor, weights: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Depth [b, S, S] in the form that the loss compares: log(1 + metres), or log(metres)."""
        maps = self.maps(images, weights, numbers)
        if self.config.head != "bins":
            return maps[:, 0]
        shares = maps.relu() + 0.1  # as DINOv2's depther has it, which divides by the sum in place of softmax
        centres = torch.linspace(*self.limits, maps.shape[1], device=maps.device)
        metres = torch.einsum("bkhw,k->bhw", shares, centres) / shares.sum(1)
        return self._code(metres)

    def _code(self, metres: Tensor) -> Tensor:
        return metres.log1p() if self.config.loss == "log1p" else metres.log()

    def _decode(self, codes: Tensor) -> Tensor:
        metres = codes.expm1() if self.config.loss == "log1p" else codes.exp()
        return metres.clamp(*self.limits)

    def _metrics(self, codes: Tensor, truth: Tensor, valid: Tensor) -> dict[str, Tensor]:
        _, height, width = valid.shape
        inside = valid & crop_mask(self.config.crop, height, width, valid.device)
        predicted = self._decode(codes)
        return depth_metrics(predicted, truth, inside, limits=self.limits, align=self.config.align)
