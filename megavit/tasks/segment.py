"""A class of every pixel, on a frozen or trained trunk.

Letters: b micro-batch, S image side, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavit.data.class_names import class_names_of_run, write_class_names
from megavit.data.device import to_model_input
from megavit.data.fields import Field, Plane
from megavit.model.config import ModelConfig, Recompute
from megavit.model.dense import DenseHead, LinearHead, MaskTransformer, PyramidHead
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import SegmentConfig
from megavit.tasks.dense import DenseModule, DenseTask, num_shown, shown_classes, shown_picture
from megavit.tasks.dense_loss import dice_error
from megavit.tasks.metrics import class_iou, confusion, segmentation_results
from megavit.tasks.task import AnyBatch, DeviceBatch, Group, Pictures, Sums

UNKNOWN = 255  # in masks: no class
_PYRAMID_WIDTH = 512
_HEAD_DIM = 64  # of the mask transformer


class Inputs(NamedTuple):
    """One micro-batch on the device, the same on all ranks of a TP group."""

    images: Tensor  # float32 [b, C, S, S] in [-1, 1]
    classes: Tensor  # int64 [b, S, S], UNKNOWN where there is none
    weights: Tensor  # float32 [b]
    numbers: Tensor | None = None  # int64 [b], in training: where each sample comes in the shards


class Segment(DenseTask):
    """Trains a dense head for classes. The unit is a pixel that has a class; evaluations give the mean IoU
    of one confusion matrix over the whole set, at the resolution of the model's square."""

    Config = SegmentConfig
    config: SegmentConfig
    plane = "mask"
    metric = "miou"
    _names: Sequence[str] = ()  # on the main rank, if they are known

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        super().open(run_dir, class_names)
        data, count, found = self.data, self.config.classes, self.facts().classes
        if found not in (None, count):
            raise ValueError(
                f"task.classes is {count}, but the masks of {data.shards} have {found} classes; give "
                f"--task.classes {found}"
            )
        self._names = class_names or class_names_of_run(run_dir, data.shards, data.class_names, count)

    def keep(self, folder: Path) -> None:
        super().keep(folder)
        if self._names:
            write_class_names(folder, self._names)

    def fields(self) -> Sequence[Field]:
        mask = Plane(
            "mask",
            ("mask.png",),
            dtype="uint8",
            fill=UNKNOWN,
            size=self.model.image_size,
            invalid=UNKNOWN,
            classes=self.config.classes,
            allow_empty=False,
        )
        return [self.picture(), mask]

    def build(self, init: Initializer, recompute: Recompute) -> nn.Module:
        config, model, scope = self.config, self.model, init.scope("decoder")
        size = (model.dim, config.classes, model.patch_size)
        decoder: DenseHead
        if config.head == "linear":
            decoder = LinearHead(*size, scope)
        elif config.head == "upernet":
            decoder = PyramidHead(*size, config.head_width or _PYRAMID_WIDTH, scope)
        else:
            decoder = MaskTransformer(*size, self._transformer(), scope)
        layers = config.taps(model.depth)
        return SegmentModule(self.trunk(init, recompute), decoder, layers, config)

    def _transformer(self) -> ModelConfig:
        """The mask transformer's architecture: classic blocks, of the trunk's width unless it is given."""
        width = self.config.head_width or self.model.dim
        return ModelConfig(
            name="custom",
            block="sequential",
            dim=width,
            depth=self.config.head_layers,
            num_heads=max(1, width // _HEAD_DIM) if width % _HEAD_DIM == 0 else self.model.num_heads,
            mlp_dim=4 * width,
            qk_norm=False,
            qkv_bias=True,
            norm_centring=True,
            norm_bias=True,
        )

    def inputs(self, samples: DeviceBatch, mesh: Mesh, *, training: bool) -> Inputs:
        images = to_model_input(samples.fields["image"], mesh.device)
        return Inputs(images, samples.fields["mask"].long(), samples.weights, samples.numbers)

    def weight(self, samples: AnyBatch) -> Tensor:
        return (samples.fields["mask"] != UNKNOWN).sum().float()

    def group(self, name: str, shape: tuple[int, ...], weight_decay: float) -> Group:
        if name == "decoder.classes":  # an embedding
            return Group("no_decay", 0.0)
        return super().group(name, shape, weight_decay)

    def results(self, sums: Mapping[str, Tensor], units: float) -> dict[str, float]:
        matrix = sums["confusion"]
        found = segmentation_results(matrix)
        if self.config.class_iou:
            for number, iou in enumerate(class_iou(matrix).nan_to_num().tolist()):
                found[f"iou/{self._name(number)}"] = iou
        return found | {"loss": float(sums["loss"]) / max(units, 1.0)}

    def pictures(
        self, samples: DeviceBatch, inputs: Inputs, count: int, module: nn.Module | None = None
    ) -> Pictures:
        count = num_shown(inputs.weights, count // 4)
        images, truth, weights = (part[:count] for part in inputs[:3])
        predicted = None
        if isinstance(module, SegmentModule):
            predicted = module.maps(images, weights).argmax(1)
        shown: list[Tensor] = []
        captions: list[str] = []
        for number, (image, true) in enumerate(zip(images, truth, strict=True)):
            shown += [shown_picture(image), shown_classes(true, self.config.classes)]
            known = true[true != UNKNOWN]
            names = ", ".join(
                self._name(one) for one in known.bincount().argsort(descending=True)[:3].tolist()
            )
            captions += ["input", f"classes: {names}"]
            if predicted is not None:
                shown.append(shown_classes(predicted[number], self.config.classes))
                wrong = (predicted[number] != true) & (true != UNKNOWN)
                shown.append(wrong.float().expand(3, -1, -1))
                share = float(wrong.sum()) / max(1, len(known))
                captions += ["prediction", f"error {share:.1%}"]
        return Pictures(torch.stack([picture.cpu() for picture in shown]), captions)

    def _name(self, number: int) -> str:
        return self._names[number] if self._names else str(number)


class SegmentModule(DenseModule):
    """The trunk, a dense head, and the loss of its classes."""

    def __init__(self, trunk: MegaVit, decoder: DenseHead, layers: Sequence[int], config: SegmentConfig):
        super().__init__(trunk, decoder, layers, config.norm_taps)
        self.config = config

    def forward(self, inputs: Inputs) -> Sums:
        logits = self.maps(inputs.images, inputs.weights, inputs.numbers)  # [b, K, S, S]
        truth = inputs.classes  # of unusable samples all UNKNOWN
        loss = F.cross_entropy(logits, truth, ignore_index=UNKNOWN, reduction="sum")
        if self.config.dice:
            known = truth != UNKNOWN
            loss = loss + self.config.dice * (dice_error(logits, truth, known) * known.sum((1, 2))).sum()
        if self.training:
            return Sums(loss, {})
        return Sums(loss, {"confusion": confusion(logits.argmax(1), truth, self.config.classes)})
