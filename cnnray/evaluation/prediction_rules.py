"""Rules on predictions: classes that imbalance harms, and labels that a sure model contradicts.

Shape letters: N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.evaluation.findings import SIGMAS, Finding, standard_error
from cnnray.evaluation.metrics import UNPREDICTED, ClassMetrics, Counts, Floats

IMBALANCE_RATIO = 10
"""Largest class over a rare one: where the literature's long tails begin (Cui et al. 2019)."""
RECALL_LOSS = 0.1
"""Recall that a rare class must lack, beyond chance, to be called harmed."""
NOISE_FLOOR = 0.02
"""Error of the surer half of the predictions that is not worth a finding."""
NOISE_SHARE = 0.5
"""Error of the surer half over that of all: confidence tells hard images, not wrong labels."""
MAX_NAMES = 10


def imbalance(class_counts: Mapping[str, int], per_class: Sequence[ClassMetrics]) -> Finding | None:
    """Rare classes whose recall is below that of the frequent ones, chance allowed for."""
    largest = max(class_counts.values())
    frequent = [row for row in per_class if class_counts[row["label"]] * IMBALANCE_RATIO > largest]
    rare = [row for row in per_class if class_counts[row["label"]] * IMBALANCE_RATIO <= largest]
    support = sum(row["support"] for row in frequent)
    if not support:
        return None
    usual = sum((row["recall"] or 0.0) * row["support"] for row in frequent) / support
    harmed = [
        row
        for row in rare
        if row["recall"] is not None
        and _wilson_upper(row["recall"], row["support"]) < usual - RECALL_LOSS
    ]
    if not harmed:
        return None
    harmed.sort(key=lambda row: (row["recall"] or 0.0, row["label"]))
    named = ", ".join(
        f"{row['label']} (recall {row['recall']:.0%} of {row['support']},"
        f" {class_counts[row['label']]:,} training images)"
        for row in harmed[:MAX_NAMES]
    )
    return Finding(
        name="imbalance",
        evidence={
            "classes": [row["label"] for row in harmed],
            "recall": [row["recall"] for row in harmed],
            "support": [row["support"] for row in harmed],
            "training_images": [class_counts[row["label"]] for row in harmed],
            "largest_class": largest,
            "recall_of_frequent_classes": usual,
        },
        text=f"Imbalance harms {len(harmed)} of {len(per_class)} classes, while the frequent ones"
        f" are found (recall {usual:.0%}, up to {largest:,} training images): {named}"
        f"{', …' if len(harmed) > MAX_NAMES else ''}.",
        advice=(
            "--imbalance.method logit_adjustment, or effective_number",
            "more training images of these classes",
        ),
    )


def label_noise(
    predictions: pa.Table, per_class: Sequence[ClassMetrics], *, ignored: Sequence[str]
) -> Finding | None:
    """Predictions that are wrong nearly as often where the model is sure as where it is not.

    A hard image leaves a model unsure, so that its surer half has few errors; a wrong label does
    not. Labels are counted as contradicted by confident learning (Northcutt et al. 2021,
    arXiv:1911.00068): the model says j with at least the mean probability that samples labelled j
    get for j. (Theirs may be any such j; ours is the prediction, for others are not kept.)
    """
    names = [row["label"] for row in per_class]
    label, prediction = (predictions[name].to_numpy() for name in ("label", "prediction"))
    judged = (prediction != UNPREDICTED) & ~np.isin(
        label, [index for index, name in enumerate(names) if name in ignored]
    )
    label, prediction = label[judged], prediction[judged]
    confidence = predictions["confidence"].to_numpy()[judged].astype(np.float64)
    own = np.exp(-predictions["loss"].to_numpy()[judged].astype(np.float64))  # p(label), (N,)
    is_wrong = label != prediction
    sure = np.argsort(-confidence, kind="stable")[: len(label) // 2]
    # A model that is seldom right, or finds nothing likelier than not, is no judge of labels.
    if not len(sure) or is_wrong.mean() >= 0.5 or confidence[sure].min() < 0.5:
        return None
    errors, sure_errors = float(is_wrong.mean()), float(is_wrong[sure].mean())
    floor = sure_errors - SIGMAS * standard_error(sure_errors, len(sure))
    if floor < NOISE_FLOOR or sure_errors < NOISE_SHARE * errors:
        return None
    thresholds = _mean_by_class(own, label, num_classes=len(names))  # (K,)
    contradicted = is_wrong & (confidence >= thresholds[prediction])
    pairs = _pairs(label[contradicted], prediction[contradicted], names=names)
    return Finding(
        name="label_noise",
        evidence={
            "error": errors,
            "error_of_surer_half": sure_errors,
            "contradicted_labels": int(contradicted.sum()),
            "contradicted_fraction": float(contradicted.mean()),
            "samples": len(label),
            "pairs": pairs,
        },
        text=f"Label noise suspected: even in the half that the model is surest of,"
        f" {sure_errors:.0%} of the labels disagree with it ({errors:.0%} in all); it confidently"
        f" contradicts {int(contradicted.sum()):,} of {len(label):,} labels.",
        advice=(
            "look through the worst mistakes of the report, correct wrong labels, pack again",
            "images unlike those of training look the same to this rule: compare the sources",
        ),
    )


def _wilson_upper(fraction: float, n: int) -> float:
    """Upper bound of a binomial fraction (Wilson 1927), at ``SIGMAS``; it is never 0 wide."""
    z2 = SIGMAS**2 / n
    middle = fraction + z2 / 2
    spread = math.sqrt(z2 * fraction * (1 - fraction) + z2 * z2 / 4)
    return (middle + spread) / (1 + z2)


def _mean_by_class(values: Floats, label: Counts, *, num_classes: int) -> Floats:
    """(N,), (N,) -> (K,); above any confidence for a class without samples."""
    count = np.bincount(label, minlength=num_classes)
    total = np.bincount(label, values, num_classes)
    return np.where(count > 0, total / np.maximum(count, 1), 2.0)


def _pairs(label: Counts, prediction: Counts, *, names: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent (label, prediction) pairs with their counts."""
    cells, counts = np.unique(label * len(names) + prediction, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_NAMES]
    return [
        {
            "label": names[cells[i] // len(names)],
            "prediction": names[cells[i] % len(names)],
            "samples": int(counts[i]),
        }
        for i in order.tolist()
    ]
