"""Classification losses on class-sharded logits; nothing gathers the [B, C] logits.

Letters: B local batch, C classes, /tp a rank's share (padded, see `Classifier`). Both losses take dense
targets over this rank's classes, sum over classes and average over images, as big_vision's (a mean over
classes would be C times smaller).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megavit.config import Loss
from megavit.parallel.collectives import max_over_tp, reduce_from_tp
from megavit.parallel.mesh import Mesh


def local_targets(labels: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """Class ids [B] int64 -> one-hot targets of this rank's classes, [B, ceil(C/tp)] float32, padding
    zero."""
    share = -(-num_classes // mesh.tp_size)
    mine = torch.arange(share, device=labels.device) + mesh.tp_rank * share
    return (labels[:, None] == mine).float()


def _valid(logits: Tensor, num_classes: int, mesh: Mesh) -> int:
    """How many of this rank's columns are classes, not padding."""
    share = logits.shape[-1]
    return max(0, min(share, num_classes - mesh.tp_rank * share))


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """Binary cross-entropy of every class, summed over all C, averaged over B. One all-reduce of a scalar."""
    valid = _valid(logits, num_classes, mesh)
    z, t = logits[:, :valid].float(), targets[:, :valid]
    # Not F.binary_cross_entropy_with_logits: at the initial logit of -10 it cancels to 1% per class, times
    # 30,000 classes.
    local = F.softplus(z).sum() - (z * t).sum()
    return reduce_from_tp(mesh, local / logits.shape[0])


def softmax_cross_entropy(logits: Tensor, targets: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """Cross-entropy of the softmax over all C, averaged over B. A max- and a sum-reduce of [B] and [2, B]."""
    valid = _valid(logits, num_classes, mesh)
    z, t = logits[:, :valid].float(), targets[:, :valid]
    # A rank whose columns are all padding (C < tp_size) takes part with -inf.
    top = z.detach().amax(1) if valid else z.new_full((z.shape[0],), -torch.inf)
    top = max_over_tp(mesh, top)
    z = z - top[:, None]
    normaliser, picked = reduce_from_tp(mesh, torch.stack([z.exp().sum(1), (z * t).sum(1)]))
    # Targets sum to one: sum_c t_c (log Z - z_c) = log Z - sum_c t_c z_c.
    return (normaliser.log() - picked).mean()


def cross_entropy(kind: Loss, logits: Tensor, labels: Tensor, num_classes: int, mesh: Mesh) -> Tensor:
    """The configured loss of local logits [B, ceil(C/tp)] and class ids [B]; a float32 scalar, the same on
    all TP ranks."""
    targets = local_targets(labels, num_classes, mesh)
    function = sigmoid_cross_entropy if kind == "sigmoid" else softmax_cross_entropy
    return function(logits, targets, num_classes, mesh)
