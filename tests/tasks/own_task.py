"""A task of one's own: how much ink is in the picture, a number that stands in each sample's json member."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from megavit.data.device import to_model_input
from megavit.data.fields import Number
from megavit.parallel.linear import Linear
from megavit.tasks.config import TaskConfig
from megavit.tasks.task import Sums, Task


@dataclass(frozen=True)
class InkConfig(TaskConfig):
    """Regression of a number.

    Args:
        key: the number's name in the json member.
    """

    key: str = "ink"


class Inputs(NamedTuple):
    images: Tensor  # float32 [b, C, S, S]
    numbers: Tensor  # float32 [b]
    weights: Tensor  # float32 [b], 0 for samples that could not be read


class Ink(Task):
    Config = InkConfig
    metric = "abs_error"

    def fields(self):
        return [self.picture(), Number("number", self.config.key)]

    def build(self, init, recompute):
        return Regression(self.trunk(init, recompute), Linear(self.model.dim, 1, init.scope("ink")))

    def inputs(self, samples, mesh, *, training):
        images = to_model_input(samples.fields["image"], mesh.device)
        return Inputs(images, samples.fields["number"], samples.weights)


class Regression(nn.Module):
    def __init__(self, trunk, head):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, inputs: Inputs) -> Sums:
        features = self.trunk(inputs.images.to(self.trunk.dtype))  # [b, D]
        error = self.head(features).float()[:, 0] - inputs.numbers
        squares = (error.square() * inputs.weights).sum()
        return Sums(squares, {"abs_error": (error.detach().abs() * inputs.weights).sum()})
