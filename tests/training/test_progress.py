"""Progress of an epoch: when it is emitted, and what it says."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from cnnray.training.progress import Meter, Progress


def meter(emitted: list[Progress], **changes: Any) -> Meter:
    arguments = {"epoch": 0, "epochs": 1, "steps": 4, "seconds": 1e9, "emit": emitted.append}
    return Meter(**{**arguments, **changes})


SUMS = torch.tensor([10.0, 5.0, 20.0])


def test_the_last_step_of_an_epoch_is_always_emitted() -> None:
    emitted: list[Progress] = []
    watch = meter(emitted)
    for _ in range(3):
        watch.step(5, sums=SUMS)
    assert emitted == []
    watch.step(5, sums=SUMS)
    [progress] = emitted
    assert (progress.step, progress.steps) == (4, 4)
    assert (progress.loss, progress.accuracy) == (0.5, 0.25)
    assert progress.eta_seconds == 0
    assert progress.samples_per_second > 0


def test_every_step_is_emitted_when_the_interval_is_over() -> None:
    emitted: list[Progress] = []
    watch = meter(emitted, seconds=0.0)
    for _ in range(4):
        watch.step(5, sums=SUMS)
    assert [progress.step for progress in emitted] == [1, 2, 3, 4]


def test_the_time_left_counts_the_epochs_to_come() -> None:
    emitted: list[Progress] = []
    watch = meter(emitted, epoch=1, epochs=4, seconds=0.0)
    watch.started -= 8.0
    watch.step(5, sums=SUMS)
    assert emitted[0].eta_seconds == pytest.approx(8.0 * (3 + 2 * 4), rel=0.05)


def test_an_epoch_begun_at_a_step_counts_on_from_there_at_the_speed_of_what_it_does() -> None:
    emitted: list[Progress] = []
    watch = meter(emitted, steps=100, first_step=90, seconds=0.0)
    watch.started -= 8.0
    watch.step(16, sums=SUMS)
    [progress] = emitted
    assert (progress.step, progress.steps) == (91, 100)
    assert progress.samples_per_second == pytest.approx(2.0, rel=0.05)
    assert progress.eta_seconds == pytest.approx(8.0 * 9, rel=0.05)


def test_waiting_for_batches_is_counted_and_working_on_them_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow() -> Any:
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    watch = meter([])
    seen = []
    for batch in watch.timed(slow()):
        seen.append(batch)
        now += 50.0
    assert seen == [0, 1, 2]
    assert watch.wait_seconds == 6.0
