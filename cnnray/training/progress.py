"""What people see of a running epoch: speed, loss, time left, time lost to waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cnnray.datasets.order import Batch


@dataclass(frozen=True)
class Progress:
    """Where training is, for people: one of these every few seconds."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    samples_per_second: float
    data_wait_fraction: float
    eta_seconds: float


@dataclass(frozen=True)
class Beginning:
    """Where a group of workers begins, for people: one each time that it is started."""

    num_workers: int
    epoch: int
    step: int


class Sums(Protocol):
    """Numbers that are read rarely, such as a tensor."""

    def tolist(self) -> list[float]:
        """The numbers as they are now."""


class Meter:
    """Times an epoch's steps from ``first_step`` on; emits a ``Progress`` every ``seconds``."""

    def __init__(
        self,
        *,
        epoch: int,
        epochs: int,
        steps: int,
        first_step: int = 0,
        seconds: float,
        emit: Callable[[Progress], None],
    ) -> None:
        self.epoch = epoch
        self.epochs = epochs
        self.steps = steps
        self.seconds = seconds
        self.emit = emit
        self.started = self.reported = time.perf_counter()
        self.wait_seconds = 0.0
        self.first_step = self.steps_done = first_step
        self.samples_done = 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time that each one kept the loop waiting is added up."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.wait_seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def step(self, global_batch_size: int, *, sums: Sums) -> None:
        """Count a step; ``sums`` are this rank's (loss sum, correct, samples) of the epoch."""
        self.steps_done += 1
        self.samples_done += global_batch_size
        now = time.perf_counter()
        if now - self.reported >= self.seconds or self.steps_done == self.steps:
            self.reported = now
            self.emit(self._progress(now, *sums.tolist()))

    def _progress(self, now: float, loss_sum: float, correct: float, samples: float) -> Progress:
        elapsed = now - self.started
        steps_left = self.steps - self.steps_done + (self.epochs - 1 - self.epoch) * self.steps
        return Progress(
            epoch=self.epoch,
            epochs=self.epochs,
            step=self.steps_done,
            steps=self.steps,
            loss=loss_sum / samples,
            accuracy=correct / samples,
            samples_per_second=self.samples_done / elapsed,
            data_wait_fraction=self.wait_seconds / elapsed,
            eta_seconds=elapsed / (self.steps_done - self.first_step) * steps_left,
        )
