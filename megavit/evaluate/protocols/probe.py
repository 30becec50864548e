"""A linear classifier on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The logit of a class that did not occur in training: far below all others, but finite, as scores want it.
_NEVER = -1e6


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """weight [C, D] and bias [C], over all classes of the label space, the same on every rank.

    A class that did not occur in training has weight 0 and bias -1e6: it is not predicted.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Logits [m, C] of values [m, D], computed in the probe's own precision."""
        return values.to(self.weight) @ self.weight.T + self.bias

    @staticmethod
    def over_space(weight: Tensor, bias: Tensor, classes: Tensor, num_classes: int) -> LinearProbe:
        """From weight [K, D] and bias [K] of the classes, int64 [K], that occur."""
        whole_weight = weight.new_zeros(num_classes, weight.shape[1])
        whole_bias = bias.new_full((num_classes,), _NEVER)
        whole_weight[classes], whole_bias[classes] = weight, bias
        return LinearProbe(whole_weight, whole_bias)
