"""When a history says that training is over."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cnnray.training.stopping import has_stalled


def history(*losses: float) -> list[dict[str, Any]]:
    return [{"train_loss": 0.0, "val_loss": loss} for loss in losses]


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 3.0], 1, True),  # as good is no better
        ([1.0, 2.0], 2, False),
        ([1.0, 2.0, 1.5], 2, True),  # better than the last, not than the best
        ([1.0, 2.0, 0.5, 0.6], 2, False),  # a better one starts the count again
        ([1.0, 2.0, 0.5, 0.6, 0.7], 2, True),
        ([math.nan, math.nan], 2, True),
    ],
)
def test_it_is_over_after_so_many_epochs_without_a_better_one(
    losses: list[float], patience: int, over: bool
) -> None:
    assert has_stalled(history(*losses), patience=patience, min_delta=0.0) is over


def test_less_than_the_smallest_step_is_no_better_and_a_slow_descent_counts_once_it_is() -> None:
    slow = history(1.0, 0.75, 0.5)
    assert has_stalled(slow[:2], patience=1, min_delta=0.5)
    assert not has_stalled(slow, patience=2, min_delta=0.5)  # 0.5 below the first, which was best


def test_without_patience_it_is_never_over() -> None:
    assert not has_stalled(history(*[1.0] * 99), patience=None, min_delta=0.0)


def test_without_validation_the_training_loss_counts() -> None:
    results = [{"train_loss": loss, "val_loss": None} for loss in (1.0, 2.0)]
    assert has_stalled(results, patience=1, min_delta=0.0)
