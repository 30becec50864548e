"""Colour jitter: torchvision's definition, by numbers that are a function of the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from megavit.data.color import NUM_COLOR_RANDOM, change_colors, color_changes, jitter
from megavit.data.config import DataConfig

WAYS = [
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
]
CONFIG = DataConfig(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.2)


@pytest.mark.parametrize("channels", [3, 1])
def test_each_change_is_torchvisions(channels: int) -> None:
    """Catches other weights of grey, a mean over all images, a hue that turns the wrong way, and pictures
    that get each other's changes."""
    images = torch.rand(7, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    images[0], images[1, :, 0] = 0.5, 0.0  # without hue, and black
    images[2, 0] = images[2, -1]  # two colours that are equally high or low
    changes = color_changes(CONFIG, np.random.default_rng(0).random((7, NUM_COLOR_RANDOM)))
    assert changes is not None
    found = jitter(images.transpose(0, 1), torch.from_numpy(changes)).transpose(0, 1)
    for image, numbers, jittered in zip(images, changes.tolist(), found, strict=True):
        for way, number in zip(WAYS, numbers, strict=True):
            image = way(image, number)
        torch.testing.assert_close(jittered, image, rtol=0, atol=1e-5)


def test_pictures_and_clips_keep_their_form() -> None:
    """Catches channels taken for a side of the picture, a black picture that is no longer black, and frames
    of a clip that differ in colour."""
    pictures = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    pictures[1] = 0
    changes = color_changes(CONFIG, np.full((4, NUM_COLOR_RANDOM), 0.9))
    assert changes is not None
    numbers = torch.from_numpy(changes)
    found = change_colors(pictures, numbers)
    assert found.shape == pictures.shape and found.dtype == torch.uint8 and found.is_contiguous()
    assert not found[1].any() and not torch.equal(found[0], pictures[0])
    clips = change_colors(pictures[:, None].expand(-1, 2, -1, -1, -1), numbers)
    assert torch.equal(clips, found[:, None].expand_as(clips))
    same = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(4, -1)
    assert torch.equal(change_colors(pictures, same), pictures)


def test_numbers_cover_their_ranges() -> None:
    """Catches ranges that are shifted or reach below zero, and jitter that is never off."""
    u = np.random.default_rng(0).random((4000, NUM_COLOR_RANDOM))
    found = color_changes(DataConfig(brightness=0.4, contrast=2.0), u)
    assert found is not None
    assert found.min(0) == pytest.approx([0.6, 0, 1, 0], abs=0.01)
    assert found.max(0) == pytest.approx([1.4, 3, 1, 0], abs=0.01)
    some = color_changes(DataConfig(brightness=0.4, hue=0.5, color_share=0.25), u)
    assert some is not None
    changed = some != np.array([1, 1, 1, 0], np.float32)
    assert changed.mean(0) == pytest.approx([0.25, 0, 0, 0.25], abs=0.03)
    assert (changed[:, 0] & changed[:, 3]).mean() == pytest.approx(0.0625, abs=0.02)
    assert color_changes(DataConfig(), u) is None
