"""How a decision came about: block by block what the model would say then, and what each block wrote to the
token stream and so to the score.

The token state after block l is x_l = x_(l-1) + attention_l + mlp_l, in a parallel block as in a sequential
one, so the state that is read out is the input plus all writes, to rounding. Read out through the gradient
of the score at the last state, each has a share of the score: its direct contribution, without what it makes
later blocks write.

Letters: B images, L blocks, N tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megavit.explain.gradient import constant_weights
from megavit.explain.target import Target, check
from megavit.model.vit import MegaVit
from megavit.tasks.config import Loss


class BlockPath(NamedTuple):
    """Of B images, float32 on the CPU. Columns of L + 1 begin with the input of the first block.

    `scores`, `probabilities` [B, L + 1]: the target's, read out of each state by the model's own final norm,
    pooling and classifier.
    `attention`, `mlp` [B, L]: what each block's two writes contribute directly to the score. They sum, with
    `start` [B] (the input's contribution) and `rest` [B] (biases behind the last block, and what the pooling
    makes of its attention), to the score.
    `attention_norms`, `mlp_norms` [B, L]: the writes' lengths (2-norm), mean over all tokens.
    `token_norms` [B, L + 1]: the states', mean over the patches.
    """

    scores: Tensor
    probabilities: Tensor
    attention: Tensor
    mlp: Tensor
    start: Tensor
    rest: Tensor
    attention_norms: Tensor
    mlp_norms: Tensor
    token_norms: Tensor


@torch.no_grad()
def path(model: MegaVit, images: Tensor, target: Target, *, loss: Loss = "sigmoid") -> BlockPath:
    """The way of the images [B, C, H, W] through the model. Two forward passes and a read-out a block; holds
    the states of one block at a time."""
    images = check(model, images)
    with model.observe(_Last(model.config.depth)) as last:
        model.forward_features(images)
    with model.observe(_Writes(model, target, loss, _final_gradient(model, last.state, target))) as seen:
        model.forward_features(images)
    return seen.path()


def _final_gradient(model: MegaVit, state: Tensor, target: Target) -> Tensor:
    """Of the score with respect to the last token state [B, N, D], with frozen statistics."""
    with torch.enable_grad(), constant_weights(model), model.frozen_statistics():
        state = state.detach().requires_grad_()
        return torch.autograd.grad(target.score(model.read_out(state)).sum(), state)[0]


class _Last:
    def __init__(self, depth: int):
        self._depth = depth

    def tokens(self, layer: int, x: Tensor) -> None:
        if layer == self._depth - 1:
            self.state = x


class _Writes:
    """Observes a pass and keeps a few numbers of each block."""

    def __init__(self, model: MegaVit, target: Target, loss: Loss, gradient: Tensor):
        self._model, self._target, self._loss, self._gradient = model, target, loss, gradient
        self._found: dict[str, list[Tensor]] = {}

    def writes(self, layer: int, attention: Tensor, mlp: Tensor) -> None:
        for name, written in (("attention", attention), ("mlp", mlp)):
            self._keep(name, self._contribution(written))
            self._keep(f"{name}_norms", _lengths(written).mean(1))

    def tokens(self, layer: int, x: Tensor) -> None:
        if layer == -1:
            self._keep("start", self._contribution(x))
        logits = self._model.read_out(x)
        self._keep("scores", self._target.score(logits))
        self._keep("probabilities", self._target.probability(logits, self._loss))
        self._keep("token_norms", _lengths(x)[:, self._model.config.num_prefix_tokens :].mean(1))

    def path(self) -> BlockPath:
        start = self._found.pop("start")[0]
        found = {name: torch.stack(columns, 1) for name, columns in self._found.items()}
        rest = found["scores"][:, -1] - start - found["attention"].sum(1) - found["mlp"].sum(1)
        return BlockPath(**found, start=start, rest=rest)

    def _contribution(self, written: Tensor) -> Tensor:
        return (written.float() * self._gradient.float()).sum((1, 2))

    def _keep(self, name: str, column: Tensor) -> None:
        self._found.setdefault(name, []).append(column.float().cpu())


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.float(), dim=-1)
