"""Blends of pairs: functions of their random numbers and nothing else."""

from __future__ import annotations

import numpy as np

from megavit.data import mixing
from megavit.data.config import DataConfig
from megavit.data.mixing import NUM_MIX_RANDOM


def draws(count: int = 20_000) -> np.ndarray:
    return np.random.default_rng(0).random((count, NUM_MIX_RANDOM))


def test_mixup_shares_follow_beta() -> None:
    """Catches a share that is not Beta(alpha, alpha): mean 1/2, variance 1 / (8 alpha + 4)."""
    for alpha in (0.2, 1.0):
        rows = mixing.blends(32, DataConfig(mixup=alpha), draws())
        assert abs(rows[:, 0].mean() - 0.5) < 0.01 and abs(rows[:, 0].var() - 1 / (8 * alpha + 4)) < 0.005
        assert np.array_equal(rows[:, 0], rows[:, 1]) and not rows[:, 2:].any()
    assert mixing.blends(32, DataConfig(), draws()) is None


def test_cutmix_labels_follow_the_box_that_was_cut() -> None:
    """Catches a label share from the draw, not from the box clipped at the border."""
    rows = mixing.blends(32, DataConfig(cutmix=1.0), draws())
    share, label, top, bottom, left, right = rows.T
    assert (share == 1).all() and np.allclose(label, 1 - (bottom - top) * (right - left) / 1024)
    assert top.min() == 0 and bottom.max() == 32 and (bottom >= top).all() and (right >= left).all()
    both = mixing.blends(32, DataConfig(cutmix=1.0, mixup=0.2), draws())
    assert 0.45 < (both[:, 3] > 0).mean() < 0.55
