"""Crops and movements: functions of their random numbers and nothing else."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.data import geometry
from megavit.data.config import DataConfig
from megavit.data.fields import Picture, Plane
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


@pytest.mark.parametrize("box", [(3, 5, 43, 38), (10, 10, 13, 12), (0, 0, 50, 40), (49, 39, 50, 40)])
def test_planes_take_the_pixel_at_the_centre(box: tuple[int, int, int, int]) -> None:
    """Catches planes that lie half a pixel beside their picture, and rows taken for columns."""
    plane = np.arange(40 * 50 * 2).reshape(40, 50, 2)
    left, top, right, bottom = box
    planes = torch.from_numpy(plane[top:bottom, left:right]).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (16, 16), mode="nearest-exact")[0].permute(1, 2, 0)
    found, outside = geometry.Geometry(50, 40, box).nearest(plane, 16)
    assert outside is None and np.array_equal(found, expected.numpy())
    still = geometry.Affine(cos=1.0, sin=0.0, shift=0.0, x=0.0, y=0.0)
    found, outside = geometry.Geometry(50, 40, box, still).nearest(plane, 16)
    assert outside is not None and not outside.any() and np.array_equal(found, expected.numpy())


def test_a_geometry_is_a_function_of_the_size_and_the_random_numbers() -> None:
    """Catches a mirror that is not the device's, and an evaluation that moves its pictures."""
    config = DataConfig(shift=0.1, rotate_degrees=10.0)
    for u in np.random.default_rng(0).random((20, NUM_RANDOM)):
        found = geometry.decide(400, 300, config, u)
        assert found == geometry.decide(400, 300, config, u.copy())
        assert found.mirror == geometry.flips(config, u[None])[0]
        assert found.affine and found.box == geometry.train_box(400, 300, config, u)
    assert geometry.decide(400, 300, DataConfig(), u).affine is None
    evaluation = geometry.Geometry(400, 300, geometry.eval_box(400, 300, 0.875))
    assert geometry.decide(400, 300, config, None) == evaluation
    with pytest.raises(ValueError, match=r"its depth\.png has 300x400 pixels, but its picture 400x300"):
        evaluation.at(300, 400, "depth.png")


def test_float_pictures_move_as_pictures_do() -> None:
    """Catches channels that move apart, and a border that is not filled."""
    u = np.array([0.5] * 4 + [0.9, 0.8, 0.3, 0.5, 0.6, 0.5])
    found = geometry.decide(16, 16, DataConfig(rotate_degrees=30.0, shift=0.2, zoom=0.2), u)
    moved = picture()
    found.move(moved)
    values = np.concatenate([picture(), picture() + 1.0], axis=2).astype(np.float32)
    found.move(values, fill=-9.0)
    outside = (values == -9).all(2)
    assert 0.05 < outside.mean() < 0.5 and not moved[outside].any()
    assert np.abs(values[~outside][:, :3] - moved[~outside]).max() <= 1
    assert np.allclose(values[~outside][:, :3] + 1, values[~outside][:, 3:], atol=1e-3)
    assert np.array_equal(outside, found.nearest(picture(), 16)[1])


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("rotate", [0.0, 10.0])
@pytest.mark.parametrize("antialias", [True, False])
def test_a_scaled_picture_and_its_planes_lie_together(rotate: float, antialias: bool) -> None:
    """Catches planes that are padded elsewhere than their picture or scaled otherwise, padding that counts
    as known, depths that are multiplied by the scale, and factors outside of the range."""
    y, x = np.mgrid[:60, :90]
    values = (30 + x + 2 * y).astype(np.uint8)  # smooth, so that interpolation finds the nearest pixel's
    size, config = 64, DataConfig(augment="scale", scale_range=(0.5, 2.0), rotate_degrees=rotate)
    image = Picture(size=size, channels=1, antialias=antialias)
    plane = Plane("depth", ("depth.png",), size=size, fill=-1, invalid=0)
    factors, padded = [], 0
    for u in np.random.default_rng(0).random((60, NUM_RANDOM)):
        picture, depth = np.zeros((size, size, 1), np.uint8), np.zeros((size, size), np.float32)
        choose = partial(geometry.decide, config=config, u=u)
        found = image.decode_first(png(values), "png", choose, picture)
        plane.decode(png(values), "depth.png", found, depth)
        left, top, right, bottom = geometry.train_box(90, 60, config, u)
        assert right - left == bottom - top
        factors.append(60 / (right - left))
        known = depth >= 0
        assert set(depth[known].astype(int).ravel()) <= set(values.ravel().astype(int))
        assert (picture[~known] < 120).all()
        # Where padding begins the picture is interpolated with it.
        unknown = torch.nn.functional.pad((~torch.from_numpy(known)).float()[None, None], [2] * 4, value=1.0)
        inner = (torch.nn.functional.max_pool2d(unknown, 5, 1)[0, 0] == 0).numpy()
        error = np.abs(picture[:, :, 0] - depth)[inner]
        assert error.size == 0 or error.max() <= 3.5  # half a pixel of 2 a row and 1 a column, and rounding
        padded += not known.all()
        if not rotate:
            assert not picture[~known].any()
            share = max(0, min(right, 90) - max(left, 0)) * max(0, min(bottom, 60) - max(top, 0))
            assert known.mean() == pytest.approx(share / (right - left) ** 2, abs=0.03)
    assert 0.5 <= min(factors) < 0.7 and 1.8 < max(factors) <= 2.05
    assert padded > 10


def test_a_scaled_crop_lies_everywhere() -> None:
    """Catches crops of one corner, and pictures that are padded on one side only."""
    config = DataConfig(augment="scale", scale_range=(0.5, 0.5))
    draws = np.random.default_rng(0).random((500, NUM_RANDOM))
    left, top = np.array([geometry.train_box(90, 60, config, u)[:2] for u in draws]).T
    assert (left.min(), left.max(), top.min(), top.max()) == (-30, 0, -60, 0)
    config = DataConfig(augment="scale", scale_range=(2.0, 2.0))
    left, top = np.array([geometry.train_box(90, 60, config, u)[:2] for u in draws]).T
    assert (left.min(), left.max(), top.min(), top.max()) == (0, 60, 0, 30)
