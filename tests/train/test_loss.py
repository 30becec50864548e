"""Losses on one rank against torch's; on class shards they are tested with the model (tests/model)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megavit.parallel.mesh import Mesh
from megavit.tasks.loss import image_losses, local_targets

LOGITS = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * 4
LABELS = torch.tensor([0, 8, 3, 3, 1])


def cross_entropy(
    kind: str, logits: torch.Tensor, labels: torch.Tensor, classes: int, mesh: Mesh
) -> torch.Tensor:
    targets = local_targets(kind, labels[:, None], classes, mesh)
    return image_losses(kind, logits, targets, classes, mesh).mean()


def test_sigmoid_sums_over_classes_and_averages_over_images() -> None:
    """Catches a mean over classes, which makes the loss and its gradients C times too small."""
    expected = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(LABELS, 9).float(), reduction="sum") / 5
    assert cross_entropy("sigmoid", LOGITS, LABELS, 9, Mesh.single()).item() == pytest.approx(expected.item())


def test_softmax_equals_torch_and_is_stable() -> None:
    """Catches an overflow of exp for large logits."""
    for scale in (1.0, 1e4):
        expected = F.cross_entropy(LOGITS * scale, LABELS)
        found = cross_entropy("softmax", LOGITS * scale, LABELS, 9, Mesh.single())
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_padded_columns_are_ignored(kind: str) -> None:
    """Catches padding that takes part in the normaliser or the sum."""
    padded = torch.cat([LOGITS, torch.full((5, 3), 50.0)], dim=1)
    expected = cross_entropy(kind, LOGITS, LABELS, 9, Mesh.single())
    targets_padded = cross_entropy(kind, padded, LABELS, 9, Mesh.single())
    assert targets_padded.item() == pytest.approx(expected.item())


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """Catches a loss of 30,000 classes summed in bfloat16, or with torch's cancellation (11.373 here)."""
    wide = torch.zeros(1, 30_000, dtype=torch.bfloat16) - 10
    found = cross_entropy("sigmoid", wide, torch.tensor([0]), 30_000, Mesh.single())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(10 + 30_000 * 4.5398e-05, rel=1e-4)


def test_several_labels() -> None:
    """Catches a label lost, counted twice, or the padding taken for a class."""
    labels = torch.tensor([[2, 5, -1], [0, -1, -1], [-1, -1, -1]])
    sigmoid = local_targets("sigmoid", labels, 9, Mesh.single())
    assert sigmoid.nonzero().tolist() == [[0, 2], [0, 5], [1, 0]] and sigmoid.max() == 1
    softmax = local_targets("softmax", labels, 9, Mesh.single())
    assert softmax.sum(1).tolist() == [1, 1, 0] and softmax[0, 2] == 0.5


def test_label_smoothing_equals_torch() -> None:
    """Catches smoothing that changes the targets' sum."""
    targets = local_targets("softmax", LABELS[:, None], 9, Mesh.single(), smoothing=0.1)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    assert image_losses("softmax", LOGITS, targets, 9, Mesh.single()).mean().item() == pytest.approx(
        expected.item()
    )
    smooth = local_targets("sigmoid", LABELS[:, None], 9, Mesh.single(), smoothing=0.1)
    assert smooth.amax().item() == pytest.approx(0.9 + 0.1 / 9) and smooth.amin().item() == pytest.approx(
        0.1 / 9
    )


def test_class_ranges_of_the_ranks_make_up_the_targets() -> None:
    """Catches a class that two TP ranks hold, or none: 30,000 classes in 7 ranges with padding."""
    labels = torch.tensor([[0, 4285, 4286, 29_999], [17, -1, -1, -1]])
    parts = [local_targets("sigmoid", labels, 30_000, Mesh(tp_size=7, tp_rank=rank)) for rank in range(7)]
    whole = torch.cat(parts, dim=1)
    assert whole.shape == (2, 30_002)
    assert whole.nonzero().tolist() == [[0, 0], [0, 4285], [0, 4286], [0, 29_999], [1, 17]]
