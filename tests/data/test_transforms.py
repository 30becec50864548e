"""Crops, movements and blends: functions of their random numbers and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from megavit.data.transforms import NUM_MIX_RANDOM, NUM_RANDOM

from megavit.data import transforms
from megavit.data.config import DataConfig


def picture(side: int = 16) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side] * (255 // side)
    return np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (1, 1), (3, 50)])
def test_inception_crop_stays_inside_and_covers_its_range(width: int, height: int) -> None:
    """Catches boxes beyond the border or empty, and areas outside 5..100%."""
    draws = np.random.default_rng(0).random((2000, NUM_RANDOM))
    boxes = np.array([transforms.train_box(width, height, DataConfig(), u) for u in draws])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    assert (right > left).all() and (bottom > top).all()
    if width == 400:
        area = (right - left) * (bottom - top) / 120_000
        assert area.min() > 0.048 and 0.4 < area.mean() < 0.6
        assert ((right - left) / (bottom - top)).min() > 0.72
        assert (right == 400).any() and (left == 0).any()


def test_center_crop_keeps_the_middle() -> None:
    """Catches a crop of the corner or a squeezed aspect."""
    assert transforms.eval_box(200, 100, 1.0) == (50, 0, 150, 100)
    assert transforms.eval_box(200, 100, 0.5) == (75, 25, 125, 75)
    assert transforms.eval_box(1, 1, 0.1) == (0, 0, 1, 1)
    config = DataConfig(augment="none", eval_crop=0.5)
    assert transforms.train_box(200, 100, config, np.zeros(NUM_RANDOM)) == (75, 25, 125, 75)


def test_affine_moves_the_picture_the_right_way() -> None:
    """Catches a zero augmentation that is not the identity, and a shift in pixels of the wrong axis."""
    config = DataConfig(shift=0.25)
    u = np.full(NUM_RANDOM, 0.5)
    moved = picture()
    transforms.affine(moved, config, u)
    assert np.array_equal(moved, picture())
    u[5] = 1.0  # dx = +0.25 * 16: output pixel x shows input pixel x + 4
    transforms.affine(moved, config, u)
    assert np.array_equal(moved[:, :12], picture()[:, 4:])
    assert (moved[:, 13:] == 0).all()
    grey = picture()[:, :, :1].copy()
    transforms.affine(grey, config, u)
    assert np.array_equal(grey[:, :12], picture()[:, 4:, :1])


def test_flip_happens_for_half_unless_turned_off() -> None:
    """Catches an inverted or missing flip."""
    u = np.random.default_rng(0).random((4000, NUM_RANDOM))
    assert 0.45 < transforms.flips(DataConfig(), u).mean() < 0.55
    assert not transforms.flips(DataConfig(flip=False), u).any()


def draws(count: int = 20_000) -> np.ndarray:
    return np.random.default_rng(0).random((count, NUM_MIX_RANDOM))


def test_mixup_shares_follow_beta() -> None:
    """Catches a share that is not Beta(alpha, alpha): mean 1/2, variance 1 / (8 alpha + 4)."""
    for alpha in (0.2, 1.0):
        rows = transforms.blends(32, DataConfig(mixup=alpha), draws())
        assert abs(rows[:, 0].mean() - 0.5) < 0.01 and abs(rows[:, 0].var() - 1 / (8 * alpha + 4)) < 0.005
        assert np.array_equal(rows[:, 0], rows[:, 1]) and not rows[:, 2:].any()
    assert transforms.blends(32, DataConfig(), draws()) is None


def test_cutmix_labels_follow_the_box_that_was_cut() -> None:
    """Catches a label share from the draw, not from the box clipped at the border."""
    rows = transforms.blends(32, DataConfig(cutmix=1.0), draws())
    share, label, top, bottom, left, right = rows.T
    assert (share == 1).all() and np.allclose(label, 1 - (bottom - top) * (right - left) / 1024)
    assert top.min() == 0 and bottom.max() == 32 and (bottom >= top).all() and (right >= left).all()
    both = transforms.blends(32, DataConfig(cutmix=1.0, mixup=0.2), draws())
    assert 0.45 < (both[:, 3] > 0).mean() < 0.55
