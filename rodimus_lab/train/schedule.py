"""The learning rate over the steps."""

from __future__ import annotations

import math

from rodimus_lab.recipe import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int, *, eval_every: int = 1) -> float:
    """The rate of the update that ends step `step` (1 to `steps`).

    The warm-up rises linearly to `peak` at step `warmup_steps`. After it cosine and linear fall to exactly `min_lr` at
    the last step; cosine_by_epoch is the cosine of the last evaluation before this step, so never quite at `min_lr`;
    inverse_sqrt is peak * sqrt(warmup / step), not below `min_lr`; constant stays at the peak.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    floor = schedule.min_lr
    progress = (step - warmup) / (steps - warmup)
    if schedule.kind == "cosine_by_epoch":
        progress = max(0.0, ((step - 1) // eval_every * eval_every - warmup) / (steps - warmup))
    if schedule.kind in ("cosine", "cosine_by_epoch"):
        return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.kind == "linear":
        return floor + (peak - floor) * (1 - progress)
    if schedule.kind == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup, 1) / step))
    return peak
