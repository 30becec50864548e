"""Losses on one rank against torch's; on class shards they are tested with the model (tests/model)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megavit.parallel.mesh import Mesh
from megavit.train.loss import cross_entropy

LOGITS = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * 4
LABELS = torch.tensor([0, 8, 3, 3, 1])


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
