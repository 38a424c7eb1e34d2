"""The learning rate at its turning points, and against torch's own schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from cnnray.training.schedules import learning_rate_factor, peak_learning_rate


def factor(step: int, name: str = "cosine", warmup: int = 10, total: int = 101) -> float:
    return learning_rate_factor(
        step, name=name, total_steps=total, warmup_steps=warmup, min_fraction=0.2
    )


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 10),
        (4, 5 / 10),
        (9, 1.0),  # the end of warm-up
        (10, 1.0),  # the start of the cosine
        (55, 0.2 + 0.8 * 0.5),  # half of the way
        (100, 0.2),  # the last step
        (500, 0.2),  # beyond it
    ],
)
def test_cosine_with_warm_up(step: int, expected: float) -> None:
    assert factor(step) == pytest.approx(expected)


def test_cosine_follows_its_formula_and_never_rises() -> None:
    values = [factor(step) for step in range(10, 101)]
    assert values[30] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)
    assert values == sorted(values, reverse=True)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert [factor(step, "constant", warmup=2) for step in (0, 1, 2, 100)] == [0.5, 1, 1, 1]
    assert [factor(step, "constant", warmup=0) for step in (0, 100)] == [1, 1]


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 5), (5, 9), (6, 5)])
def test_short_runs_have_a_learning_rate_too(total: int, warmup: int) -> None:
    values = [factor(step, total=total, warmup=warmup) for step in range(total)]
    assert all(0 < value <= 1 for value in values)


def torchs(scheduler: type[LRScheduler], steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < steps:
            schedule.step()
    return rates


@pytest.mark.parametrize("steps", [20, 101])
def test_one_cycle_is_that_of_torch(steps: int) -> None:
    ours = [
        learning_rate_factor(step, name="one_cycle", total_steps=steps, min_fraction=0.001)
        for step in range(steps)
    ]
    theirs = torchs(
        OneCycleLR,
        steps,
        max_lr=1.0,
        total_steps=steps,
        final_div_factor=1 / (25 * 0.001),
        cycle_momentum=False,
    )
    assert ours == pytest.approx(theirs)


def test_step_is_that_of_torch_with_its_milestones_as_fractions() -> None:
    ours = [
        learning_rate_factor(step, name="step", total_steps=40, milestones=(0.5, 0.75), gamma=0.2)
        for step in range(40)
    ]
    assert ours == pytest.approx(torchs(MultiStepLR, 40, milestones=[20, 30], gamma=0.2))


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_short_runs_of_one_cycle_have_a_learning_rate_too(total: int) -> None:
    values = [factor(step, "one_cycle", total=total) for step in range(total)]
    assert all(0 < value <= 1 for value in values)


def test_the_peak_is_scaled_from_the_reference_to_the_batch_that_there_is() -> None:
    assert peak_learning_rate(0.1, global_batch_size=1024, reference_batch=256) == 0.4
    assert peak_learning_rate(0.1, global_batch_size=1024, reference_batch=None) == 0.1
