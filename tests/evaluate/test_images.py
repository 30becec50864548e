"""Images on their way to a model: what a set's adjustments and an augmentation do to the pixels."""

from __future__ import annotations

import numpy as np
import torch

from megavit.data.loader import Share
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.images import Augment, Transform, load_batches
from megavit.evaluate.sets.image_set import Adjust, ImageSet, Pixels, one_label

PLAIN = Preprocessing(8, 3, 0.5, "bilinear", True, (0.5,) * 3, (0.5,) * 3, "softmax")


def ramp(height: int, width: int) -> np.ndarray:
    """Pixels that tell their own place: row, column, 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def test_border_and_whole_squares() -> None:
    """Catches a border that stays (ObjectNet), and a set that is cropped a second time (ImageNet-C)."""
    # 8 pixels are copied, not resized: the crop is seen exactly.
    assert Transform(PLAIN, Adjust())(ramp(16, 16), "").tolist() == ramp(16, 16)[4:12, 4:12].tolist()
    bordered = Transform(PLAIN, Adjust(border=2))(ramp(20, 24), "")
    assert bordered.tolist() == ramp(20, 24)[6:14, 8:16].tolist()
    assert Transform(PLAIN, Adjust(whole=True))(ramp(8, 12), "").tolist() == ramp(8, 12)[:, 2:10].tolist()
    edge = np.full((20, 20, 3), 50, np.uint8)
    edge[[0, -1]] = edge[:, [0, -1]] = 255  # a frame of one pixel
    whole = Transform(PLAIN, Adjust(border=1, whole=True))(edge, "")
    assert int(whole.max()) == 50


def test_transforms_are_told_apart() -> None:
    """Catches features of one transform that are taken for those of another."""
    adjusts = [
        Adjust(),
        Adjust(border=2),
        Adjust(whole=True),
        Adjust(corruption="contrast", severity=1),
        Adjust(corruption="contrast", severity=2),
        Adjust(corruption="fog", severity=2),
    ]
    assert len({Transform(PLAIN, adjust).digest for adjust in adjusts}) == len(adjusts)
    assert "contrast of severity 2" in Transform(PLAIN, adjusts[4]).text
    assert "cut off 2 px a side" in Transform(PLAIN, adjusts[1]).text


def test_corruptions_depend_on_the_image_alone() -> None:
    """Catches noise that differs from pass to pass, or is the same in every image."""
    noisy = Transform(PLAIN, Adjust(corruption="gaussian_noise", severity=3))
    flat = np.full((16, 16, 3), 128, np.uint8)
    assert torch.equal(noisy(flat, "a.png"), noisy(flat, "a.png"))
    assert not torch.equal(noisy(flat, "a.png"), noisy(flat, "b.png"))


def test_random_crops_depend_on_seed_epoch_and_image_alone() -> None:
    """Catches crops that differ with the batches or ranks, repeat in every epoch, or are never mirrored."""
    pixels = Pixels("ramps", np.stack([ramp(40, 40)] * 12))
    images = ImageSet("ramps", "train", pixels, one_label([0] * 12), ("a",), "s", pixels.digest())
    transform = Transform(PLAIN, Adjust())

    def cropped(size: int, augment: Augment) -> torch.Tensor:
        batches = np.array_split(np.arange(12), 12 // size)
        loaded = load_batches(images, transform, batches, Share(), 0, augment)
        return torch.cat([batch.pixels for batch in loaded])

    first = cropped(4, Augment())
    assert torch.equal(first, cropped(3, Augment()))
    assert not torch.equal(first, cropped(4, Augment(epoch=1)))
    assert not torch.equal(first, cropped(4, Augment(seed=1)))
    assert len({tuple(image.flatten().tolist()) for image in first}) == 12
    rising = first[:, 0, -1, 1].int() - first[:, 0, 0, 1].int()  # columns from left to right
    assert (rising > 0).any() and (rising < 0).any()
    unflipped = cropped(4, Augment(flip=False))
    assert (unflipped[:, 0, -1, 1] > unflipped[:, 0, 0, 1]).all()
    whole = cropped(4, Augment(crop_area=(1.0, 1.0), flip=False))
    assert int(whole[:, 0, 0].max()) < 8  # no image is cropped by more than its aspect
