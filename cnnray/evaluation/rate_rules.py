"""Rules on the learning rate: too high when a run does not settle, too low when it crawls."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from cnnray.evaluation.findings import (
    SIGMAS,
    SKILL,
    Epoch,
    Finding,
    TrainingRun,
    relative_fall,
    standard_error,
)

STEP_DOWN = 0.05
"""Loss of accuracy from one epoch to the next that a run does not show when it settles."""
BLOW_UP = 1.1
"""Mean loss of the first epoch over that of guessing. Other losses than cross-entropy begin lower,
so that with them this sign may be missed, not invented."""
SLOW_FALL = 0.05
"""Fall of the training loss in an epoch, relative, below which it is slow."""
STEADY_PACE = 0.5
"""Late over early fall: at a good rate the loss falls fast, then flattens; at a low one it falls in
a line (CS231n, "Learning and evaluation")."""


def rate_too_high(run: TrainingRun) -> Finding | None:
    """Accuracy that drops late in training, or ends below its best; a first epoch that blew up.

    Early swings are left alone: they are common at good rates, and gone when the rate is annealed.
    So is the training accuracy of mixed images, which drops where an epoch was mixed more.
    """
    if len(run.history) < 3:
        return None
    late = run.history[len(run.history) // 2 :]
    train = [epoch.train_accuracy for epoch in run.history]
    drops = [
        b
        for a, b in pairwise(late)
        if not run.is_mixed
        and a.train_accuracy - b.train_accuracy > _step(a.train_accuracy, run.num_train)
    ]
    swings = _swings([e.val_accuracy for e in late if e.val_accuracy is not None], n=run.num_val)
    lost = max(train) - train[-1]
    is_lost = not run.is_mixed and lost > _step(max(train), run.num_train)
    blew_up = _blew_up(run)
    if len(drops) < 2 and swings < 2 and not is_lost and not blew_up:
        return None
    rate = max(epoch.learning_rate for epoch in run.history)
    reasons = [
        f"training accuracy dropped late ({len(drops)} ×)" if drops else "",
        f"validation accuracy swung late ({swings} ×)" if swings else "",
        f"training ended {100 * lost:.1f} points below its best" if is_lost else "",
        f"the first epoch's loss ({run.history[0].train_loss:.3g}) was above that of guessing"
        f" ({run.guessing_loss:.3g}) and training reached {max(train):.1%} at best"
        if blew_up
        else "",
    ]
    return Finding(
        name="learning_rate_too_high",
        evidence={
            "learning_rate": rate,
            "train_drops": len(drops),
            "val_swings": swings,
            "best_train_accuracy": max(train),
            "train_accuracy": train[-1],
            "first_train_loss": run.history[0].train_loss,
            "guessing_loss": run.guessing_loss,
            "train_loss": run.history[-1].train_loss,
        },
        text=f"Learning rate too high at {rate:.3g}: "
        + ", ".join(reason for reason in reasons if reason)
        + ".",
        advice=(
            f"--optimizer.lr {rate / 10:.2g}",
            "--schedule.name cosine --schedule.warmup_epochs 1",
        ),
    )


def rate_too_low(run: TrainingRun) -> Finding | None:
    """A training loss that falls slowly and in a line, while little is learned."""
    last = run.history[-1]
    accuracy = max(last.train_accuracy, last.val_accuracy or 0.0)
    if run.skill(accuracy) >= SKILL or not _falls_steadily(run):
        return None
    full = _at_full_rate(run)
    fall = median(relative_fall(a.train_loss, b.train_loss) for a, b in pairwise(full))
    rate = max(epoch.learning_rate for epoch in run.history)
    return Finding(
        name="learning_rate_too_low",
        evidence={
            "learning_rate": rate,
            "first_train_loss": full[0].train_loss,
            "train_loss": last.train_loss,
            "loss_fall_per_epoch": fall,
            "accuracy": accuracy,
        },
        text=f"Learning rate too low at {rate:.3g}: the training loss falls in a line, by"
        f" {fall:.1%} an epoch ({full[0].train_loss:.3g} to {last.train_loss:.3g}),"
        f" with {accuracy:.1%} right after {len(run.history)} epochs.",
        advice=(f"--optimizer.lr {rate * 10:.2g}",),
    )


def _falls_steadily(run: TrainingRun) -> bool:
    """Slowly, in nearly every epoch, and late as fast as early, while the rate is near its peak."""
    losses = [epoch.train_loss for epoch in _at_full_rate(run)]
    if len(losses) < 4:
        return False
    falls = [a - b for a, b in pairwise(losses)]
    third = max(1, len(falls) // 3)
    early, late = sum(falls[:third]), sum(falls[-third:])
    return (
        sum(fall > 0 for fall in falls) >= 0.8 * len(falls)
        and 0 < median(relative_fall(a, b) for a, b in pairwise(losses)) < SLOW_FALL
        and late >= STEADY_PACE * early > 0
    )


def _at_full_rate(run: TrainingRun) -> list[Epoch]:
    """The epochs without those of warm-up and annealing, which are slow by intention."""
    peak = max(epoch.learning_rate for epoch in run.history)
    return [epoch for epoch in run.history if epoch.learning_rate >= peak / 2]


def _blew_up(run: TrainingRun) -> bool:
    """A first epoch that was worse than guessing, and a model that did not recover from it."""
    first, last = run.history[0], run.history[-1]
    accuracy = max(last.train_accuracy, last.val_accuracy or 0.0)
    return (
        first.train_loss > BLOW_UP * run.guessing_loss
        and run.skill(accuracy) < SKILL
        and not _falls_steadily(run)
    )


def _step(accuracy: float, n: int) -> float:
    """The drop of an accuracy that is neither chance nor small."""
    return max(STEP_DOWN, SIGMAS * math.sqrt(2) * standard_error(accuracy, n))


def _swings(accuracies: list[float], *, n: int) -> int:
    """How often an accuracy dropped by a step and a later one was a step above it again."""
    return sum(
        a - b > _step(a, n) and max(accuracies[i + 1 :]) - b > _step(a, n)
        for i, (a, b) in enumerate(pairwise(accuracies))
    )
