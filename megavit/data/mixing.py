"""mixup and cutmix: which pairs of slots are blended, and how. Decided here, done on the device.

Randomness comes in as numbers, never from a generator, so that a pair's blend depends on (seed, epoch,
position) alone.
"""

from __future__ import annotations

import numpy as np

from megavit.data.config import DataConfig

NUM_MIX_RANDOM = 4  # uniforms that one pair of slots consumes


def blends(size: int, config: DataConfig, u: np.ndarray) -> np.ndarray | None:
    """How the two slots of each pair are mixed, float32 [B, 6], or None without mixup and cutmix.

    Columns: share of the own pixels, share of the own label, and the box (top, bottom, left, right) that
    comes from the partner. `u` [B, NUM_MIX_RANDOM] is the same for both slots of a pair, so that each is the
    other's mirror.
    mixup: arXiv 1710.09412, cutmix: 1905.04899.
    """
    if not (config.mixup or config.cutmix):
        return None
    use_cutmix = (u[:, 0] < 0.5) if config.mixup and config.cutmix else np.full(len(u), bool(config.cutmix))
    share = np.where(use_cutmix, _beta(config.cutmix, u[:, 1]), _beta(config.mixup, u[:, 1]))
    side = size * np.sqrt(1 - share)
    edges = []
    for centre in (u[:, 2] * size, u[:, 3] * size):
        edges += [np.clip(np.round(centre + sign * side / 2), 0, size) * use_cutmix for sign in (-1, 1)]
    top, bottom, left, right = edges
    label = np.where(use_cutmix, 1 - (bottom - top) * (right - left) / size**2, share)
    pixels = np.where(use_cutmix, 1.0, share)
    return np.stack([pixels, label, top, bottom, left, right], axis=1).astype(np.float32)


def _beta(alpha: float, u: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) by its inverse distribution function: one uniform a draw, whatever alpha."""
    from scipy.special import betaincinv

    return betaincinv(alpha, alpha, u) if alpha else np.ones_like(u)
