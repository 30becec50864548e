"""Decoding and augmentation."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megavit.config import DataConfig
from megavit.data.transforms import (
    NUM_RANDOM,
    _inception_box,
    decode,
    eval_transform,
    to_model_input,
    train_transform,
)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    rows = np.linspace(0, 255, height)[:, None, None]
    cols = np.linspace(0, 255, width)[None, :, None]
    pixels = np.concatenate(np.broadcast_arrays(rows, cols, np.zeros(1)), axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


KINDS = [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")]
KINDS += [("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [("WEBP", mode) for mode in ("RGB", "RGBA")]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_every_kind_of_file_becomes_rgb_or_grey(kind: str, mode: str) -> None:
    """Catches a palette, alpha, CMYK or 16-bit file that changes the number of channels."""
    buffer = io.BytesIO()
    image = Image.new("I;16", (40, 30), 30_000) if mode == "I;16" else picture().convert(mode)
    image.save(buffer, kind)
    assert eval_transform(decode(buffer.getvalue(), 3), 8, DataConfig()).shape == (8, 8, 3)
    assert eval_transform(decode(buffer.getvalue(), 1), 8, DataConfig()).shape == (8, 8, 1)


def test_sixteen_bit_images_keep_their_shades() -> None:
    """Catches 16-bit PNGs clipped to white."""
    buffer = io.BytesIO()
    Image.new("I;16", (9, 9), 30_000).save(buffer, "PNG")
    assert (np.asarray(decode(buffer.getvalue(), 1)) == 30_000 >> 8).all()


def test_augmentation_is_a_function_of_its_numbers() -> None:
    """Catches a global random generator: workers and ranks would disagree."""
    config = DataConfig(rotate_degrees=10, shift=0.1, zoom=0.1)
    u = np.random.default_rng(0).random(NUM_RANDOM)
    first, again = (train_transform(picture(), 16, config, u) for _ in range(2))
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, train_transform(picture(), 16, config, 1 - u))


def test_inception_crop_stays_inside_and_covers_its_range() -> None:
    """Catches boxes beyond the border and areas outside 5..100%."""
    boxes = np.array(
        [_inception_box((400, 300), (0.05, 1.0), u) for u in np.random.default_rng(0).random((2000, 8))]
    )
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400.001).all() and (bottom <= 300.001).all()
    area = (right - left) * (bottom - top) / 120_000
    assert area.min() > 0.049 and area.max() <= 1.0001 and 0.4 < area.mean() < 0.6
    assert ((right - left) / (bottom - top)).min() > 0.74


def test_flip_happens_for_half() -> None:
    """Catches an inverted or missing flip."""
    config = DataConfig(augment="none", eval_crop=1.0)
    u = np.full(NUM_RANDOM, 0.9)
    plain = train_transform(picture(16, 16), 16, config, u)
    u[7] = 0.1
    assert np.array_equal(train_transform(picture(16, 16), 16, config, u), plain[:, ::-1])
    assert np.array_equal(plain, eval_transform(picture(16, 16), 16, config))


def test_affine_moves_the_picture_the_right_way() -> None:
    """Catches a zero augmentation that is not the identity, and a shift in pixels of the wrong axis."""
    image = picture(16, 16)
    config = DataConfig(augment="none", eval_crop=1.0, flip=False, shift=0.25)
    u = np.full(NUM_RANDOM, 0.5)
    assert np.array_equal(train_transform(image, 16, config, u), np.asarray(image))
    u[5] = 1.0  # dx = +0.25 * 16: output pixel x shows input pixel x + 4
    moved = train_transform(image, 16, config, u)
    assert np.array_equal(moved[:, :12], np.asarray(image)[:, 4:])
    assert (moved[:, 13:] == 0).all()


def test_center_crop_keeps_the_middle() -> None:
    """Catches a crop of the corner or a squeezed aspect."""
    image = Image.new("L", (200, 100))
    image.paste(255, (50, 0, 150, 100))
    assert (eval_transform(image, 32, DataConfig(eval_crop=1.0))[1:-1, 1:-1] == 255).all()


def test_model_input_spans_minus_one_to_one() -> None:
    """Catches ImageNet statistics or 0..1 where the paper's family uses [-1, 1]."""
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 3, 1)
    x = to_model_input(images, torch.device("cpu"))
    assert x.shape == (1, 1, 1, 3)
    assert torch.allclose(x.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
