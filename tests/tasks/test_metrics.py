"""Metrics and losses of maps against plain numpy, written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megavit.tasks.dense_loss import dice_error, gradient_error, silog_error, squared_error
from megavit.tasks.metrics import (
    Align,
    class_iou,
    confusion,
    crop_mask,
    depth_metrics,
    per_image,
    segmentation_results,
)
from megavit.tasks.windows import mirrored, sliding_window

LIMITS = (1e-3, 10.0)


def scenes(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, truth and what is valid of images with very different numbers of valid pixels."""
    random = torch.Generator().manual_seed(0)
    truth = 0.5 + 9 * torch.rand(count, 24, 31, generator=random)
    predicted = truth * (0.6 + 0.8 * torch.rand(truth.shape, generator=random)) + 0.1
    shares = torch.linspace(0.02, 1, count)[:, None, None]
    valid = torch.rand(truth.shape, generator=random) < shares
    valid[2] = False
    return predicted, truth, valid


def numpy_depth(predicted: np.ndarray, truth: np.ndarray, valid: np.ndarray, align: str) -> dict[str, float]:
    rows = []
    for image, true, mask in zip(predicted.astype(float), truth.astype(float), valid, strict=True):
        if not mask.any():
            continue
        t, p = true[mask], image[mask]
        if align == "median":
            p = p * np.median(t) / np.median(p)
        if align == "least_squares":
            (a, b), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)
            p = a * p + b
        p = np.clip(p, *LIMITS)
        worse = np.maximum(p / t, t / p)
        rows.append(
            {
                "abs_rel": np.mean(abs(p - t) / t),
                "rmse": math.sqrt(np.mean((p - t) ** 2)),
                "rmse_log": math.sqrt(np.mean((np.log(p) - np.log(t)) ** 2)),
                "log10": np.mean(abs(np.log10(p / t))),
                "delta1.1": np.mean(worse < 1.1),
                "delta1": np.mean(worse < 1.25),
                "delta2": np.mean(worse < 1.5625),
                "delta3": np.mean(worse < 1.953125),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@pytest.mark.parametrize("align", ["none", "median", "least_squares"])
def test_depth_errors_are_those_of_numpy(align: Align) -> None:
    """Catches means over the pixels of all images, of images without a valid pixel, alignments on invalid
    pixels, and float32 sums."""
    predicted, truth, valid = scenes()
    expected = numpy_depth(predicted.numpy(), truth.numpy(), valid.numpy(), align)
    parts = [
        depth_metrics(predicted[part], truth[part], valid[part], limits=LIMITS, align=align)
        for part in (slice(0, 1), slice(1, 5))
    ]
    found = per_image({name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert found == pytest.approx(expected, abs=1e-6)


def test_crops_are_those_of_the_benchmarks() -> None:
    """Catches crops that are off by a row, or turned."""
    nyu = crop_mask("eigen", 480, 640, torch.device("cpu"))
    expected = torch.zeros(480, 640, dtype=torch.bool)
    expected[45:471, 41:601] = True
    assert torch.equal(nyu, expected)
    kitti = crop_mask("garg", 375, 1242, torch.device("cpu"))
    expected = torch.zeros(375, 1242, dtype=torch.bool)
    expected[
        int(0.40810811 * 375) : int(0.99189189 * 375), int(0.03594771 * 1242) : int(0.96405229 * 1242)
    ] = 1
    assert torch.equal(kitti, expected)
    assert crop_mask("none", 3, 4, torch.device("cpu")).all()


def test_miou_is_that_of_one_matrix_over_the_set() -> None:
    """Catches a mean of images' IoUs, classes that occur nowhere counted as 0, and ignored pixels that count
    as false positives."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 5, (6, 9, 7))
    predicted = np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, 6, truth.shape))
    truth[random.random(truth.shape) < 0.2] = 255
    known = truth != 255
    ious, recalls = [], []
    for k in range(7):  # class 5 is only predicted, class 6 occurs nowhere
        both = np.sum((truth == k) & (predicted == k))
        either = np.sum(known & ((truth == k) | (predicted == k)))
        ious.append(both / either if either else math.nan)
        if (truth == k).any():
            recalls.append(both / np.sum(truth == k))
    matrix = sum(
        confusion(torch.from_numpy(p), torch.from_numpy(t), 7) for p, t in zip(predicted, truth, strict=True)
    )
    assert isinstance(matrix, Tensor)
    found = segmentation_results(matrix.double())
    assert found["miou"] == pytest.approx(np.nanmean(ious), abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(np.mean((truth == predicted)[known]), abs=1e-12)
    assert found["class_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
    np.testing.assert_allclose(class_iou(matrix).numpy(), ious, atol=1e-12)


def test_miou_is_torchmetrics() -> None:
    """Catches a definition that is not the field's (macro Jaccard index with ignored pixels)."""
    from torchmetrics.classification import MulticlassJaccardIndex

    truth, predicted = torch.randint(0, 4, (2, 3, 8, 8)).unbind()
    truth[0, :3] = 255
    theirs = MulticlassJaccardIndex(4, average="macro", ignore_index=255)(predicted, truth)
    assert segmentation_results(confusion(predicted, truth, 4))["miou"] == pytest.approx(
        float(theirs), abs=1e-6
    )


def test_losses_are_those_of_numpy() -> None:
    """Catches losses that average pixels across images, and gradients of images without a valid pixel."""
    predicted, truth, valid = scenes()
    errors = torch.where(valid, predicted.log() - truth.log(), 0.0).requires_grad_()
    found = {
        "square": squared_error(errors, valid),
        "silog": silog_error(errors, valid, 0.85),
        "gradient": gradient_error(errors, valid),
    }
    numbers = {name: losses.tolist() for name, losses in found.items()}
    for number, (error, mask) in enumerate(zip(errors.detach().double().numpy(), valid.numpy(), strict=True)):
        e = error[mask] if mask.any() else np.zeros(1)
        assert numbers["square"][number] == pytest.approx(np.mean(e**2), rel=1e-5)
        silog = math.sqrt(np.var(e) + 0.15 * np.mean(e) ** 2)
        assert numbers["silog"][number] == pytest.approx(silog, rel=1e-4, abs=1e-6)
        total = 0.0
        for step in (1, 2, 4, 8):
            small, known = error[::step, ::step], mask[::step, ::step]
            pairs = [
                abs(small[y, x] - small[y2, x2])
                for y in range(small.shape[0])
                for x in range(small.shape[1])
                for y2, x2 in ((y + 1, x), (y, x + 1))
                if y2 < small.shape[0] and x2 < small.shape[1] and known[y, x] and known[y2, x2]
            ]
            total += sum(pairs) / max(known.sum(), 1)
        assert numbers["gradient"][number] == pytest.approx(total, rel=1e-5)
    torch.stack(list(found.values())).sum().backward()
    assert errors.grad is not None and errors.grad.isfinite().all() and not errors.grad[2].any()


def test_dice_is_that_of_numpy() -> None:
    """Catches dice of ignored pixels and of classes that do not occur."""
    logits, truth = torch.randn(2, 4, 6, 5), torch.randint(0, 3, (2, 6, 5))
    truth[:, :2] = 255
    found = dice_error(logits, truth, truth != 255)
    for number, (some, true) in enumerate(zip(logits.softmax(1).numpy(), truth.numpy(), strict=True)):
        known = true != 255
        terms = [
            1 - 2 * some[k][true == k].sum() / (some[k][known].sum() + (true == k).sum())
            for k in range(4)
            if (true == k).any()
        ]
        assert float(found[number]) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 37), (9, 40), (5, 7)])
def test_windows_cover_an_image_and_agree_where_they_overlap(height: int, width: int) -> None:
    """Catches a border that no window reaches, overlaps that are added up, and padding that stays."""
    sizes = []

    def predict(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[2:]))
        return torch.cat([images, 2 * images], 1)

    images = torch.randn(2, 1, height, width)
    found = sliding_window(predict, images, 16, 11)
    torch.testing.assert_close(found, torch.cat([images, 2 * images], 1))
    assert set(sizes) == {(16, 16)}
    with pytest.raises(ValueError, match="stride"):
        sliding_window(predict, images, 16, 17)


def test_a_mirrored_copy_is_mirrored_back() -> None:
    """Catches a map that is averaged with the mirrored one."""
    images = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(mirrored(lambda x: x)(images), images)
    to_the_right = mirrored(lambda x: x.cumsum(3))(images)
    torch.testing.assert_close(to_the_right.flip(3), mirrored(lambda x: x.cumsum(3))(images.flip(3)))
