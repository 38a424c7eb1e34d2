"""The learning rate: its peak from the size of the batch, its course over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

ONE_CYCLE_RISE = 0.3
"""Part of the steps in which one_cycle rises."""
ONE_CYCLE_START = 1 / 25
"""Where one_cycle begins, fraction of the peak."""


def peak_learning_rate(lr: float, *, global_batch_size: int, reference_batch: int | None) -> float:
    """``lr`` is meant for ``reference_batch`` samples a step: scaled linearly to the batch that
    there is (Goyal et al. 2017), or as it is without a reference.
    """
    return lr if reference_batch is None else lr * global_batch_size / reference_batch


def learning_rate_factor(
    step: int,
    *,
    name: str,
    total_steps: int,
    warmup_steps: int = 0,
    min_fraction: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """Fraction of the peak learning rate at a 0-based step.

    ``constant``, ``cosine`` and ``step`` after a linear warm-up from 1/warmup_steps: ``cosine`` is
    half a cosine (Loshchilov & Hutter 2017) that ends at ``min_fraction`` on the last step,
    ``step`` multiplies by ``gamma`` at each of ``milestones``, fractions of all steps.
    ``one_cycle`` has a rise of its own, half a cosine from 1/25 over 30 % of the steps, and falls
    like ``cosine`` (Smith & Topin 2018; the momentum is left alone).
    """
    if name == "one_cycle":
        return _one_cycle(step, total_steps=total_steps, min_fraction=min_fraction)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    if name == "step":
        return float(gamma ** sum(step >= part * total_steps for part in milestones))
    return _half_cosine(1.0, min_fraction, _part(step, warmup_steps, total_steps - 1))


def _one_cycle(step: int, *, total_steps: int, min_fraction: float) -> float:
    peak_step = max(0.0, ONE_CYCLE_RISE * total_steps - 1)
    if step < peak_step:
        return _half_cosine(ONE_CYCLE_START, 1.0, step / peak_step)
    return _half_cosine(1.0, min_fraction, _part(step, peak_step, total_steps - 1))


def _part(step: int, first: float, last: float) -> float:
    """How far a step is from the first one to the last, 0 to 1."""
    return min(1.0, (step - first) / max(1.0, last - first))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))
