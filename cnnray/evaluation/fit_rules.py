"""Rules on the gap between training and validation: overfitting, underfitting, memorised noise."""

from __future__ import annotations

import math

from cnnray.evaluation.findings import (
    SIGMAS,
    SKILL,
    Finding,
    TrainingRun,
    relative_fall,
    standard_error,
)

GAP = 0.05
"""Generalisation gap, as accuracy, that is worth doing something about."""
LOSS_RISE = 1.1
"""Last validation loss over the lowest: also smaller gaps count once it turned (Prechelt 1998)."""
FLAT_FALL = 0.01
"""Fall of the training loss in an epoch, relative, below which more epochs bring little."""
UNLEARNED = 0.03
"""Validation accuracy lost since its peak, while training accuracy rose by ``RELEARNED``: wrong
labels are memorised after the patterns, at the expense of these (Arpit et al. 2017,
arXiv:1706.05394). Overfitting to right labels costs validation loss, seldom accuracy."""
RELEARNED = 0.05


def overfitting(run: TrainingRun) -> Finding | None:
    """Training accuracy beyond validation accuracy, by more than chance and by enough to matter.

    Training accuracy is taken while the weights still change and under augmentation, so that the
    true gap is rather larger.
    """
    last = run.history[-1]
    if last.val_accuracy is None or last.val_loss is None or not run.num_val:
        return None
    losses = [math.inf if epoch.val_loss is None else epoch.val_loss for epoch in run.history]
    lowest = min(losses)
    best = losses.index(lowest)
    gap = last.train_accuracy - last.val_accuracy
    error = math.hypot(
        standard_error(last.train_accuracy, run.num_train),
        standard_error(last.val_accuracy, run.num_val),
    )
    has_turned = last.val_loss > LOSS_RISE * lowest
    if gap < SIGMAS * error or (gap < GAP and not has_turned):
        return None
    turned = (
        f"; the validation loss was lowest in epoch {best + 1} ({lowest:.3g},"
        f" now {last.val_loss:.3g})"
        if has_turned
        else ""
    )
    return Finding(
        name="overfitting",
        evidence={
            "train_accuracy": last.train_accuracy,
            "val_accuracy": last.val_accuracy,
            "gap": gap,
            "standard_error": error,
            "val_loss": last.val_loss,
            "lowest_val_loss": lowest,
            "best_epoch": best + 1,
        },
        text=f"Overfitting: {last.train_accuracy:.1%} right in training, {last.val_accuracy:.1%} in"
        f" validation, a gap of {100 * gap:.1f} ± {100 * error:.1f} points{turned}.",
        advice=(
            "--augment.policy trivialaugment, and --augment.flip 0.5 where a mirrored image keeps"
            " its class",
            "--optimizer.name adamw --optimizer.weight_decay 0.05",
            *([f"--epochs {best + 1}, with --schedule.name cosine"] if has_turned else []),
            "more training images",
        ),
    )


def underfitting(run: TrainingRun) -> Finding | None:
    """Neither split is learned, and they agree: more of the same data would not help."""
    last = run.history[-1]
    accuracy = max(last.train_accuracy, last.val_accuracy or 0.0)
    skill = run.skill(accuracy)
    if skill >= SKILL:
        return None
    recent = run.history[-max(2, len(run.history) // 4 + 1) :]
    fall = relative_fall(recent[0].train_loss, recent[-1].train_loss) / max(1, len(recent) - 1)
    is_flat = len(run.history) > 1 and fall < FLAT_FALL
    still = "has stopped falling" if is_flat else "still falls"
    cause = " The network is too small, or many labels are wrong." if is_flat else ""
    rate = max(epoch.learning_rate for epoch in run.history)
    return Finding(
        name="underfitting",
        evidence={
            "train_accuracy": last.train_accuracy,
            "val_accuracy": last.val_accuracy,
            "skill": skill,
            "train_loss": last.train_loss,
            "loss_fall_per_epoch": fall,
        },
        text=f"Underfitting: {accuracy:.1%} right at best, {skill:.0%} of the way from guessing to"
        f" perfect, and the training loss ({last.train_loss:.3g}) {still}"
        f" ({fall:.1%} an epoch).{cause}",
        advice=(
            "--model.name resnet18 or another larger network, less augmentation",
            f"--optimizer.lr {rate / 3:.2g}, then {rate * 3:.2g}",
        )
        if is_flat
        else (f"--epochs {3 * len(run.history)}",),
    )


def memorised_noise(run: TrainingRun) -> Finding | None:
    """Validation accuracy that is lost while training accuracy is won."""
    seen = [epoch for epoch in run.history if epoch.val_accuracy is not None]
    if not seen or not run.num_val:
        return None
    accuracies = [epoch.val_accuracy or 0.0 for epoch in seen]
    peak = accuracies.index(max(accuracies))
    lost = accuracies[peak] - accuracies[-1]
    won = seen[-1].train_accuracy - seen[peak].train_accuracy
    error = math.sqrt(2) * standard_error(accuracies[peak], run.num_val)
    if lost < max(UNLEARNED, SIGMAS * error) or won < RELEARNED:
        return None
    return Finding(
        name="label_noise",
        evidence={
            "peak_epoch": peak + 1,
            "peak_val_accuracy": accuracies[peak],
            "val_accuracy": accuracies[-1],
            "lost": lost,
            "standard_error": error,
            "train_accuracy_at_peak": seen[peak].train_accuracy,
            "train_accuracy": seen[-1].train_accuracy,
        },
        text=f"Label noise suspected: since epoch {peak + 1} validation accuracy fell from"
        f" {accuracies[peak]:.1%} to {accuracies[-1]:.1%} (± {100 * error:.1f} points), while"
        f" training accuracy rose from {seen[peak].train_accuracy:.1%} to"
        f" {seen[-1].train_accuracy:.1%}, as when wrong labels are memorised.",
        advice=(
            "evaluate the bundle and look through the worst mistakes of its report",
            f"--epochs {peak + 1}, with --schedule.name cosine",
        ),
    )
