"""Crops and movements: functions of their random numbers and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from megavit.data import geometry
from megavit.data.config import DataConfig
from megavit.data.geometry import NUM_RANDOM


def picture(side: int = 16) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side] * (255 // side)
    return np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (1, 1), (3, 50)])
def test_inception_crop_stays_inside_and_covers_its_range(width: int, height: int) -> None:
    """Catches boxes beyond the border or empty, and areas outside 5..100%."""
    draws = np.random.default_rng(0).random((2000, NUM_RANDOM))
    boxes = np.array([geometry.train_box(width, height, DataConfig(), u) for u in draws])
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
    assert geometry.eval_box(200, 100, 1.0) == (50, 0, 150, 100)
    assert geometry.eval_box(200, 100, 0.5) == (75, 25, 125, 75)
    assert geometry.eval_box(1, 1, 0.1) == (0, 0, 1, 1)
    config = DataConfig(augment="none", eval_crop=0.5)
    assert geometry.train_box(200, 100, config, np.zeros(NUM_RANDOM)) == (75, 25, 125, 75)


def test_affine_moves_the_picture_the_right_way() -> None:
    """Catches a zero augmentation that is not the identity, and a shift in pixels of the wrong axis."""
    config = DataConfig(shift=0.25)
    u = np.full(NUM_RANDOM, 0.5)
    moved = picture()
    geometry.decide(16, 16, config, u).move(moved)
    assert np.array_equal(moved, picture())
    u[5] = 1.0  # dx = +0.25 * 16: output pixel x shows input pixel x + 4
    geometry.decide(16, 16, config, u).move(moved)
    assert np.array_equal(moved[:, :12], picture()[:, 4:])
    assert (moved[:, 13:] == 0).all()
    grey = picture()[:, :, :1].copy()
    geometry.decide(16, 16, config, u).move(grey)
    assert np.array_equal(grey[:, :12], picture()[:, 4:, :1])


def test_flip_happens_for_half_unless_turned_off() -> None:
    """Catches an inverted or missing flip."""
    u = np.random.default_rng(0).random((4000, NUM_RANDOM))
    assert 0.45 < geometry.flips(DataConfig(), u).mean() < 0.55
    assert not geometry.flips(DataConfig(flip=False), u).any()
