"""What the doctor reads and what it says: a run's curves and split sizes, and findings.

*Skill* is accuracy on a scale from 0, always naming the most frequent class, to 1, always right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

SIGMAS = 3.0
"""Standard errors that a difference must exceed."""
SKILL = 0.7
"""Below it a model that agrees on training and validation images has not learned the task."""

Name = Literal[
    "overfitting",
    "underfitting",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "imbalance",
    "label_noise",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the numbers, a sentence that says them, and what to try."""

    name: Name
    evidence: dict[str, Any]
    text: str
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {**asdict(self), "advice": list(self.advice)}


@dataclass(frozen=True)
class Epoch:
    """What the doctor reads of an ``EpochResult``."""

    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float


@dataclass(frozen=True)
class TrainingRun:
    """The curves of a run and the sizes of its splits."""

    history: tuple[Epoch, ...]
    class_counts: Mapping[str, int]  # of the training split
    num_val: int
    is_mixed: bool = False  # MixUp or CutMix: training accuracy depends on how it was mixed

    @cached_property
    def num_train(self) -> int:
        """Samples of the training split."""
        return sum(self.class_counts.values())

    @cached_property
    def guessing_loss(self) -> float:
        """Cross-entropy of giving every class the same probability, nats."""
        return math.log(len(self.class_counts))

    def skill(self, accuracy: float) -> float:
        """0 for always naming the most frequent class, 1 for always being right."""
        guess = max(self.class_counts.values()) / self.num_train
        return (accuracy - guess) / (1 - guess) if guess < 1 else 1.0


def standard_error(fraction: float, n: int) -> float:
    """Of a binomial fraction; two successes and failures are added, so that it is never 0."""
    smoothed = (fraction * n + 2) / (n + 4)
    return math.sqrt(smoothed * (1 - smoothed) / (n + 4))


def relative_fall(before: float, after: float) -> float:
    """Of a loss, as a fraction of what it was."""
    return (before - after) / before if before > 0 else 0.0
