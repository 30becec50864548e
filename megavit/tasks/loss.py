"""Classification losses on class-sharded logits; nothing gathers the [B, C] logits.

Letters: B local batch, C classes, /tp a rank's share (padded, see `Classifier`), M labels of an image at
most. Both losses take dense targets over this rank's classes and sum over classes, as big_vision's (a mean
over classes would be C times smaller).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.parallel.collectives import max_over_tp, reduce_from_tp
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import Loss


def local_targets(kind: Loss, labels: Tensor, num_classes: int, mesh: Mesh, smoothing: float = 0.0) -> Tensor:
    """Class ids [B, M], filled up with -1, -> targets of this rank's classes, [B, ceil(C/tp)] float32.

    sigmoid: one for every label. softmax: the labels share the mass of one. `smoothing` spreads that share of
    the targets evenly over the C classes.
    """
    share = -(-num_classes // mesh.tp_size)
    local = labels.long() - mesh.tp_rank * share
    elsewhere = (labels < 0) | (local < 0) | (local >= share)
    targets = torch.zeros(
        len(labels), share + 1, device=labels.device
    )  # the last column takes what is elsewhere
    targets = targets.scatter_(1, local.masked_fill(elsewhere, share), 1.0)[:, :share]
    if kind == "softmax":
        targets = targets / (labels >= 0).sum(1, keepdim=True).clamp(min=1)
    return targets * (1 - smoothing) + smoothing / num_classes if smoothing else targets


def _valid(logits: Tensor, num_classes: int, mesh: Mesh) -> int:
    """How many of this rank's columns are classes, not padding."""
    share = logits.shape[-1]
    return max(0, min(share, num_classes - mesh.tp_rank * share))


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """Binary cross-entropy of every class, summed over all C: [B] float32. One all-reduce of [B]."""
    valid = _valid(logits, num_classes, mesh)
    z, t = logits[:, :valid].float(), targets[:, :valid]
    # Not F.binary_cross_entropy_with_logits: at the initial logit of -10 it cancels to 1% per class, times
    # 30,000 classes.
    return reduce_from_tp(mesh, F.softplus(z).sum(1) - (z * t).sum(1))


def softmax_cross_entropy(logits: Tensor, targets: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """Cross-entropy of the softmax over all C: [B] float32. A max- and a sum-reduce of [B] and [2, B]."""
    valid = _valid(logits, num_classes, mesh)
    z, t = logits[:, :valid].float(), targets[:, :valid]
    # A rank whose columns are all padding (C < tp_size) takes part with -inf.
    top = z.detach().amax(1) if valid else z.new_full((z.shape[0],), -torch.inf)
    top = max_over_tp(mesh, top)
    z = z - top[:, None]
    normaliser, picked = reduce_from_tp(mesh, torch.stack([z.exp().sum(1), (z * t).sum(1)]))
    # Targets sum to one: sum_c t_c (log Z - z_c) = log Z - sum_c t_c z_c.
    return normaliser.log() - picked


def image_losses(kind: Loss, logits: Tensor, targets: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """The configured loss of local logits [B, ceil(C/tp)] and their targets: [B] float32, the same on all TP
    ranks."""
    function = sigmoid_cross_entropy if kind == "sigmoid" else softmax_cross_entropy
    return function(logits, targets, num_classes, mesh)
