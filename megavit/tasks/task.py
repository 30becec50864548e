"""A task: what a run learns. The one seam between the trainer and everything that is about labels, masks or
depth; README.md in this folder walks through a task of one's own.

The loop asks the task for the fields of a sample, for the root module, and for each micro-batch's inputs; the
root module returns sums, which the trainer divides and adds up over micro-batches and ranks. So the loss is
that of the global batch at any number of ranks, and an evaluation is exact.

Letters: b micro-batch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megavit.data.config import DataConfig
from megavit.data.fields import Field, Picture
from megavit.model.config import ModelConfig, Recompute
from megavit.model.vit import MegaVit
from megavit.parallel.init import Initializer
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import TaskConfig, load_task


class DeviceBatch(NamedTuple):
    """A whole micro-batch on the device, the same on all ranks of a TP group."""

    fields: dict[str, Tensor]  # by name, [b, ...]; what has the shape of the picture is mirrored with it
    weights: Tensor  # float32 [b]; 0 for samples that could not be used, whose fields hold their fill values
    blends: Tensor | None = None  # float32 [b, 6], see `data.mixing.blends`
    numbers: Tensor | None = None  # int64 [b], in training: where each sample comes in the shards


class AnyBatch(Protocol):
    """A part of a micro-batch on the host, or the whole of it on the device."""

    @property
    def fields(self) -> dict[str, Tensor]: ...
    @property
    def weights(self) -> Tensor: ...


class Sums(NamedTuple):
    """What the root module returns of one micro-batch: sums over this data-parallel rank's units (images,
    valid pixels, pairs), the same on all ranks of a TP group. Units of samples of weight 0 do not count."""

    loss: Tensor  # float32 []
    metrics: dict[str, Tensor]  # of any shape, e.g. a confusion matrix in evaluation; numbers in training


class Pictures(NamedTuple):
    """What a run shows of a micro-batch."""

    images: Tensor  # float32 [n, C, S, S] in [0, 1]; of more than three channels the first three are shown
    captions: list[str]  # n, of one or more lines


class Training(NamedTuple):
    """What a run trains on."""

    num_samples: int  # in its shards
    data: str  # a digest of the shards
    frozen: str  # what tells the weights that are not trained from others


class Group(NamedTuple):
    """How the optimizer treats a parameter; parameters of equal groups are updated together."""

    name: str
    weight_decay: float
    lr_factor: float = 1.0  # the learning rate is the schedule's times this


class Task(ABC):
    """The base class of tasks. A subclass must define `build` and `inputs`, and may define the rest.

    It holds configuration only, so every process may have one of its own. Nothing here but `build`'s module
    has parameters.
    """

    # A frozen dataclass: its fields are the flags --task.*. A saved run goes on with the same values.
    Config: ClassVar[type[TaskConfig]] = TaskConfig
    # The result of an evaluation that a run ends with.
    metric: ClassVar[str] = "loss"

    def __init__(self, config: TaskConfig, model: ModelConfig, data: DataConfig):
        self.config, self.model, self.data = config, model, data

    def open(self, run_dir: Path, class_names: Sequence[str] | None = None) -> None:  # noqa: B027 (optional)
        """On the main rank, before anything is built: read what the run needs beside its samples, from the
        data or from the run folder of a run that goes on or is exported; `class_names` may be given instead.
        ValueError, naming the file, if it does not fit."""

    def keep(self, folder: Path) -> None:  # noqa: B027 (optional)
        """On the main rank, once the run folder is open: write what `open` found, for whoever uses the
        run; and the same into an export."""

    def reserve(self, num_samples: int, dtype: torch.dtype) -> None:  # noqa: B027 (optional)
        """On the main rank, before anything is built: ValueError if there is no room for what the run will
        keep of its training samples beside checkpoints; `dtype` is the model's."""

    def begin(self, module: nn.Module, training: Training) -> None:  # noqa: B027 (optional)
        """On every rank, when the root module has its weights and before the first step."""

    def fields(self) -> Sequence[Field]:
        """What is decoded of each sample. The first picture decides how the others are cropped."""
        return [self.picture()]

    def eval_fields(self) -> Sequence[Field]:
        """What is decoded of each sample for evaluations: fields of the same names. Here, the same fields."""
        return self.fields()

    def picture(self) -> Picture:
        """The field "image": uint8 [S, S, C] of the model's size and channels."""
        data = self.data
        return Picture(
            size=self.model.image_size,
            channels=self.model.channels,
            antialias=data.antialias,
            decoder=data.decoder,
            max_pixels=data.max_pixels,
        )

    @abstractmethod
    def build(self, init: Initializer, recompute: Recompute) -> nn.Module:
        """The root module, on the default device: the trunk (`trunk`), and what the task adds.

        Its `forward` takes what `inputs` returns and returns `Sums`; `self.training` tells whether they are
        for an optimizer step or for an evaluation. All its parameters are made with `init`, those of the task
        below a scope of their own: it makes them at any TP size, ZeRO stage and seed.
        """

    def trunk(self, init: Initializer, recompute: Recompute, *, num_classes: int = 0) -> MegaVit:
        """A `MegaVit` of the run's architecture, for `build`; without a classifier unless `num_classes`."""
        return MegaVit.from_config(
            dataclasses.replace(self.model, num_classes=num_classes),
            mesh=init.mesh,
            seed=init.seed,
            recompute=recompute,
            deferred_init=init.deferred,
        )

    @abstractmethod
    def inputs(self, samples: DeviceBatch, mesh: Mesh, *, training: bool) -> Any:
        """What the root module takes: tensors, or a (named) tuple of them. On the device, without
        gradients."""

    def weight(self, samples: AnyBatch) -> Tensor:
        """The number of units in the samples, float32 []: what sums are divided by. Here, of samples that
        could be used."""
        return samples.weights.sum()

    def pictures(
        self, samples: DeviceBatch, inputs: Any, count: int, module: nn.Module | None = None
    ) -> Pictures | None:
        """The first `count` pictures of a micro-batch as the root module gets them, with what the samples say
        of them and, with the root module (in an evaluation), what it predicts; for TensorBoard. Here: none.

        Every rank calls it, as the module may need them all; only the main rank has opened the task.
        """
        return None

    def group(self, name: str, shape: tuple[int, ...], weight_decay: float) -> Group:
        """The group of the parameter called `name`, of the logical `shape`; `weight_decay` is that of the
        DeepSpeed JSON. Here: matrices decay, embeddings and vectors do not."""
        is_kernel = len(shape) > 1 and name not in _NOT_KERNELS
        return Group("body", weight_decay) if is_kernel else Group("no_decay", 0.0)

    def results(self, sums: Mapping[str, Tensor], units: float) -> dict[str, float]:
        """What an evaluation found, from the sums over a whole validation set (float64, on the CPU; the loss
        is among them) and its number of units. Whole numbers are counts. Here: each sum per unit."""
        return {name: float(value) / max(units, 1.0) for name, value in sums.items()}


def blank_samples(task: Task, count: int, device: torch.device) -> DeviceBatch:
    """`count` samples whose fields hold their fill values, of weight 1: for measuring."""
    fields = {
        field.name: torch.full(
            (count, *field.shape), field.fill, dtype=getattr(torch, field.dtype), device=device
        )
        for field in task.fields()
    }
    return DeviceBatch(fields, torch.ones(count, device=device))


# Matrices that are not kernels: big_vision decays '.*/kernel' only.
_NOT_KERNELS = ("embed.position", "prefix")


def make_task(config: TaskConfig, model: ModelConfig, data: DataConfig) -> Task:
    """The task that a run's configuration names. ValueError if there is none of that name."""
    found: Task = load_task(config.name)(config, model, data)
    return found
