"""Where in an epoch a run is: what a checkpoint inside an epoch remembers besides the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """Additive counts: means are taken once, at the end, from sums over all ranks."""

    loss_sum: float = 0.0
    num_correct: float = 0.0
    num_samples: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss of a sample."""
        return self.loss_sum / self.num_samples if self.num_samples else math.nan

    @property
    def accuracy(self) -> float:
        """Fraction of samples whose label has the highest logit."""
        return self.num_correct / self.num_samples if self.num_samples else math.nan


@dataclass(frozen=True)
class Place:
    """A point of an epoch between two steps, the same on all ranks."""

    epoch: int  # 0-based
    step: int = 0  # optimizer steps of this epoch that are done
    tally: Tally = Tally()  # of those steps, over all ranks


class Interval:
    """Whether ``seconds`` have passed since it was made or last restarted; 0 never pass."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.started = self.clock()

    def is_over(self) -> bool:
        """Whether it is time."""
        return self.seconds > 0 and self.clock() - self.started >= self.seconds


class Pace:
    """Steps between two looks: about ``seconds`` of training, and ``most`` steps at most."""

    def __init__(
        self, step: int, *, seconds: float, most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self.most = most
        self.clock = clock
        self.step, self.looked = step, clock()

    def look(self, step: int) -> int:
        """Steps that fit until the next look, if they go on as they went since the last one."""
        steps, seconds = step - self.step, self.clock() - self.looked
        self.step, self.looked = step, self.looked + seconds
        fitting = int(self.seconds * steps / seconds) if seconds > 0 else self.most
        return max(1, min(self.most, fitting))
