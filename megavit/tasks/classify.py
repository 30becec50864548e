"""Classification: an image has one label, or with the sigmoid loss any number of them.

Letters: b micro-batch, S image side, C channels, K classes, /tp a rank's share, M --data.max_labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from megavit.data.class_names import class_names_of_run, write_class_names
from megavit.data.device import blend, to_model_input
from megavit.data.fields import Field, Labels
from megavit.model.config import Recompute
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import ClassifyConfig, Loss
from megavit.tasks.loss import image_losses, local_targets
from megavit.tasks.task import DeviceBatch, Group, Pictures, Sums, Task

_TOP = 5


class Inputs(NamedTuple):
    """One micro-batch on the device, the same on all ranks of a TP group but for the targets."""

    images: Tensor  # float32 [b, C, S, S] in [-1, 1]
    targets: Tensor  # float32 [b, ceil(K/tp)]
    labels: Tensor  # int32 [b, M], filled up with -1
    weights: Tensor  # float32 [b]


class Classify(Task):
    """Trains the trunk and its classifier. Evaluations give `top1` and `top5` over the images that have a
    label (a prediction is right if it is one of the labels), the `loss`, without label smoothing, over all,
    and the number of `unlabelled` ones."""

    Config = ClassifyConfig
    config: ClassifyConfig
    metric = "top1"
    _names: Sequence[str] = ()  # on the main rank, if they are known

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:
        data, count = self.data, self.model.num_classes
        if class_names is None:
            self._names = class_names_of_run(run_dir, data.shards, data.class_names, count)
        elif len(class_names) == count:
            self._names = list(class_names)
        else:
            raise ValueError(f"there are {len(class_names)} class names for the {count} classes of the model")

    def keep(self, folder: Path) -> None:
        if self._names:
            write_class_names(folder, self._names)

    def fields(self) -> Sequence[Field]:
        labels = Labels(
            num_classes=self.model.num_classes,
            max_labels=self.data.max_labels,
            allow_none=self.config.loss == "sigmoid",
        )
        return [self.picture(), labels]

    def build(self, init: Initializer, recompute: Recompute) -> nn.Module:
        trunk = self.trunk(init, recompute, num_classes=self.model.num_classes)
        return Classification(trunk, self.config.loss)

    def inputs(self, samples: DeviceBatch, mesh: Mesh, *, training: bool) -> Inputs:
        config, labels, weights = self.config, samples.fields["label"], samples.weights
        smoothing = config.label_smoothing if training else 0.0
        targets = local_targets(config.loss, labels, self.model.num_classes, mesh, smoothing)
        images = to_model_input(samples.fields["image"], mesh.device)
        if samples.blends is not None:
            images, targets = blend(images, targets, weights, samples.blends)
        return Inputs(images, targets, labels, weights)

    def pictures(
        self, samples: DeviceBatch, inputs: Inputs, count: int, module: nn.Module | None = None
    ) -> Pictures:
        images, captions = inputs.images[:count], self._label_captions(samples, count)
        if module is not None:
            best, predicted = _predict(module, images, self.config.loss)
            captions = [
                f"{self._name(number)} {share:.0%}\n{caption}"
                for number, share, caption in zip(predicted, best, captions, strict=True)
            ]
        return Pictures((images + 1) / 2, captions)

    def _label_captions(self, samples: DeviceBatch, count: int) -> list[str]:
        """The samples' labels; of a blended pair the shares of both."""
        usable = (samples.weights > 0).tolist()
        labels = [
            ", ".join(self._name(label) for label in row if label >= 0) or "no label"
            for row in samples.fields["label"].tolist()
        ]

        def caption(slot: int) -> str:
            partner = slot ^ 1
            if not usable[slot]:
                return "not usable"
            share = 1.0 if samples.blends is None or not usable[partner] else float(samples.blends[slot, 1])
            if share < 1.0:
                return f"{share:.0%} {labels[slot]}\n{1 - share:.0%} {labels[partner]}"
            return labels[slot] if labels[slot] == "no label" else f"label: {labels[slot]}"

        return [caption(slot) for slot in range(min(count, len(usable)))]

    def _name(self, number: int) -> str:
        return self._names[number] if self._names else str(number)

    def group(self, name: str, shape: tuple[int, ...], weight_decay: float) -> Group:
        if name == "head.weight":  # ViT-22B: 0.03 on the body, 3.0 on the head
            own = self.config.head_weight_decay
            return Group("head", weight_decay if own is None else own)
        return super().group(name, shape, weight_decay)

    def results(self, sums: Mapping[str, Tensor], units: float) -> dict[str, float]:
        labelled = int(sums["labelled"])
        found = {
            name: float(sums[name]) / max(labelled, 1) for name in ("top1", f"top{_TOP}") if name in sums
        }
        return found | {"loss": float(sums["loss"]) / max(units, 1.0), "unlabelled": int(units) - labelled}


def _predict(module: Any, images: Tensor, loss: Loss) -> tuple[list[float], list[int]]:
    """The probability and the number of each image's most probable class."""
    logits = module.trunk(images.to(module.trunk.dtype))  # [b, K]
    best = (logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)).max(1)
    return best.values.tolist(), best.indices.tolist()


class Classification(nn.Module):
    """The trunk with its classifier, and the loss of its logits."""

    def __init__(self, trunk: MegaVit, loss: Loss):
        super().__init__()
        self.trunk, self.loss = trunk, loss

    def forward(self, inputs: Inputs) -> Sums:
        trunk, num_classes = self.trunk, self.trunk.config.num_classes
        logits = trunk(inputs.images.to(trunk.dtype), local_logits=True)
        losses = image_losses(self.loss, logits, inputs.targets, num_classes, trunk.mesh)
        metrics = {} if self.training else self._counts(logits, inputs)
        return Sums((losses * inputs.weights).sum(), metrics)

    def _counts(self, local_logits: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """How many of the images have a label, and have it among the classes with the largest logits."""
        assert self.trunk.head is not None
        labels, weights = inputs.labels, inputs.weights
        logits = self.trunk.head.gather_logits(local_logits)
        best = logits.topk(min(_TOP, logits.shape[1]), 1).indices
        right = (labels[:, None] == best[:, :, None]).any(2)  # [b, 5]
        counts = {"labelled": ((labels >= 0).any(1) * weights).sum()}
        # argmax and topk may differ in what they make of equal logits.
        counts["top1"] = ((labels == logits.argmax(1)[:, None]).any(1) * weights).sum()
        if logits.shape[1] > _TOP:
            counts[f"top{_TOP}"] = (right.any(1) * weights).sum()
        return counts
