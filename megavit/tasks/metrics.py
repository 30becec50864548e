"""What predictions of depth and of classes are worth, as sums that are exact over any split of the images.

Letters: B images, H and W their sides, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Align = Literal["none", "median", "least_squares"]
Crop = Literal["none", "eigen", "garg"]

# Top, bottom, left and right, as shares of the sides. Eigen's of NYUv2 is rows 45 to 471 of 480 and columns
# 41 to 601 of 640; Garg's (arXiv 1603.04992) is KITTI's.
_CROPS = {
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
_DELTAS = {"delta1.1": 1.1, "delta1": 1.25, "delta2": 1.25**2, "delta3": 1.25**3}


def crop_mask(crop: Crop, height: int, width: int, device: torch.device) -> Tensor:
    """bool [H, W]: the pixels that count."""
    mask = torch.ones(height, width, dtype=torch.bool, device=device)
    if crop == "none":
        return mask
    top, bottom, left, right = _CROPS[crop]
    inside = torch.zeros_like(mask)
    inside[int(top * height + 1e-6) : int(bottom * height + 1e-6), int(left * width) : int(right * width)] = (
        True
    )
    return inside


def align_depth(predicted: Tensor, truth: Tensor, valid: Tensor, align: Align) -> Tensor:
    """A prediction [H, W] brought to the truth on the `valid` pixels: by the ratio of the medians, or by the
    factor and shift of least squares. float64."""
    predicted, truth = predicted.double(), truth.double()
    if align == "none" or not valid.any():
        return predicted
    p, t = predicted[valid], truth[valid]
    if align == "median":
        return predicted * (t.quantile(0.5) / p.quantile(0.5))
    deviation = p - p.mean()
    factor = (deviation * t).sum() / deviation.square().sum().clamp(min=1e-12)
    return predicted * factor + (t.mean() - factor * p.mean())


def depth_metrics(
    predicted: Tensor,
    truth: Tensor,
    valid: Tensor,
    *,
    limits: tuple[float, float],
    align: Align = "none",
) -> dict[str, Tensor]:
    """Errors of predictions [B, H, W] in metres: of each image the mean over its `valid` pixels (bool [B, H,
    W]), and of these the sum over the images that have any, whose number is "images". float64 scalars.

    abs_rel |p - t| / t, rmse, rmse_log, log10 |log10 p - log10 t|, and the shares of pixels with max(p / t,
    t / p) below 1.1, 1.25, 1.25^2 and 1.25^3. Predictions are cut to `limits` after they are aligned.
    """
    totals = {name: predicted.new_zeros((), dtype=torch.float64) for name in depth_metric_names()}
    for image, true, mask in zip(predicted, truth, valid, strict=True):
        if mask.any():
            p = align_depth(image, true, mask, align)[mask].clamp(*limits)
            for name, value in _of_image(p, true[mask].double()).items():
                totals[name] += value
            totals["images"] += 1
    return totals


def depth_metric_names() -> list[str]:
    return ["abs_rel", "rmse", "rmse_log", "log10", *_DELTAS, "images"]


def _of_image(p: Tensor, t: Tensor) -> dict[str, Tensor]:
    logs, ratio = p.log() - t.log(), torch.maximum(p / t, t / p)
    found = {
        "abs_rel": ((p - t).abs() / t).mean(),
        "rmse": (p - t).square().mean().sqrt(),
        "rmse_log": logs.square().mean().sqrt(),
        "log10": (p.log10() - t.log10()).abs().mean(),
    }
    return found | {name: (ratio < limit).double().mean() for name, limit in _DELTAS.items()}


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """int64 [K, K]: how many pixels of each class (rows) were given each class (columns). Pixels whose truth
    is outside of 0 to K - 1 (255) do not count."""
    known = (truth >= 0) & (truth < num_classes)
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_results(matrix: Tensor) -> dict[str, float]:
    """From a confusion matrix [K, K] over a whole set: miou, the mean IoU of the classes that occur in truth
    or predictions; pixel_accuracy; class_accuracy, the mean recall of the classes that occur in truth."""
    return counted_results(class_counts(matrix))


def class_counts(matrix: Tensor) -> Tensor:
    """[3, K] of a confusion matrix: of each class the pixels that were found, that are of it in truth, and
    that were called so. They add up over images as the matrix does, and say all that the results need."""
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def counted_results(counts: Tensor) -> dict[str, float]:
    """`segmentation_results` of `class_counts`."""
    right, true, _ = counts.double()
    iou = counted_iou(counts)
    return {
        "miou": float(iou.nanmean()) if not iou.isnan().all() else 0.0,
        "pixel_accuracy": float(right.sum() / true.sum().clamp(min=1)),
        "class_accuracy": float((right / true).nanmean()) if true.any() else 0.0,
    }


def class_iou(matrix: Tensor) -> Tensor:
    """float64 [K]: of a confusion matrix; nan for a class that occurs nowhere."""
    return counted_iou(class_counts(matrix))


def counted_iou(counts: Tensor) -> Tensor:
    """`class_iou` of `class_counts`."""
    right, true, called = counts.double()
    return right / (true + called - right)


def per_image(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The means of `depth_metrics`' sums."""
    images = max(float(sums["images"]), 1.0)
    return {name: float(sums[name]) / images for name in depth_metric_names() if name != "images"}
