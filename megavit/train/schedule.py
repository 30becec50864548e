"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from megavit.train.config import ScheduleConfig


def lr_at(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the update number `step` (from 0) of `total_steps`.

    The shape starts where the warm-up ends; the cool-down multiplies it. The first and the last update are
    not zero, but for the first one with `warmup_from_zero`. rsqrt is big_vision's:
    peak / sqrt(1 + (step - warmup) / timescale).
    """
    warmup, cooldown = schedule.warmup_steps, schedule.cooldown_steps
    after_warmup = max(0, step - warmup)
    progress = after_warmup / max(1, total_steps - warmup)
    if schedule.name == "rsqrt":
        shape = 1.0 / math.sqrt(1.0 + after_warmup / schedule.timescale_steps)
    elif schedule.name == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule.name == "linear":
        shape = 1.0 - progress
    else:
        shape = 1.0
    risen = step if schedule.warmup_from_zero else step + 1
    rise = min(1.0, risen / warmup) if warmup else 1.0
    fall = min(1.0, (total_steps - step) / cooldown) if cooldown else 1.0
    return peak * shape * rise * fall
