"""What happens to a batch on the device."""

from __future__ import annotations

import torch

from megavit.data.device import blend, to_model_input

CPU = torch.device("cpu")


def test_model_input_spans_minus_one_to_one() -> None:
    """Catches ImageNet statistics or 0..1 where the paper's family uses [-1, 1]."""
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 3, 1)
    x = to_model_input(images, CPU)
    assert x.shape == (1, 1, 1, 3)
    assert torch.allclose(x.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_flips_are_left_to_right_and_of_the_chosen_images() -> None:
    """Catches images turned upside down, or all of them mirrored."""
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    plain, mirrored = (
        to_model_input(images, CPU),
        to_model_input(images, CPU, torch.tensor([True, False, True])),
    )
    assert torch.equal(mirrored[1], plain[1])
    assert torch.equal(mirrored[0], plain[0].flip(2)) and torch.equal(mirrored[2], plain[2].flip(2))


def test_blends() -> None:
    """Catches labels and pixels that go different ways, a partner from another pair, and a bad slot blended
    in."""
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4)
    targets = torch.eye(8)
    mixup, cutmix = [0.75, 0.75, 0, 0, 0, 0], [1, 0.75, 1, 3, 0, 2]
    blends = torch.tensor([mixup, mixup, cutmix, cutmix, mixup, mixup, cutmix, cutmix])
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 0])
    x, t = blend(images, targets, weights, blends)
    assert torch.allclose(x[:2, 0, 0, 0], torch.tensor([0.25, 0.75]))
    expected = torch.full((4, 4), 2.0)
    expected[1:3, 0:2] = 3
    assert torch.equal(x[2, 0], expected) and torch.equal(x[3, 0], 5 - expected)
    assert torch.allclose(t[:2, :2], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    assert torch.allclose(t[2:4, 2:4], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    assert torch.equal(x[4:], images[4:]) and torch.equal(t[4:], targets[4:])
