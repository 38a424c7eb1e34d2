"""Logits to per-sample predictions, and predictions to metrics.

Counts come from numpy: torchmetrics' confusion matrix needs N x K x K memory once PyTorch's
deterministic mode is on, and its calibration error gives a confidence of exactly 1 a bin of its
own. The tests hold both to torchmetrics wherever the two agree by definition.

Shape letters: B batch, N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cnnray.errors import DataError
from cnnray.schema import PREDICTIONS_SCHEMA

NUM_CALIBRATION_BINS = 15
UNPREDICTED = -1
"""The prediction of a sample whose logits hold NaN or +inf: it equals no label."""
UNRANKED = 2**31 - 1
"""The label's rank in such a sample: it is in no top k, whatever the number of classes."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ClassMetrics(TypedDict):
    """One class, by name; None where the denominator is zero."""

    label: str
    support: int
    precision: float | None
    recall: float | None
    f1: float | None


class CalibrationBin(TypedDict):
    """The samples with a confidence in (lower, upper], zero in the first; None without samples."""

    lower: float
    upper: float
    samples: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of one pass over a split; fractions are in [0, 1].

    ``loss`` is the mean cross-entropy and is not finite when one sample's is not. ``confusion`` is
    (K, K), rows are labels; a sample without a prediction counts as wrong and is in no cell.
    """

    samples: int
    loss: float
    accuracy: float
    top5_accuracy: float
    balanced_accuracy: float
    macro_f1: float
    ece: float
    confusion: Counts
    per_class: list[ClassMetrics]
    calibration: list[CalibrationBin]

    def to_dict(self) -> dict[str, Any]:
        """The metrics as JSON values: a loss that is not finite becomes None."""
        return {
            "samples": self.samples,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "ece": self.ece,
            "confusion": self.confusion.tolist(),
            "per_class": [dict(row) for row in self.per_class],
            "calibration": [dict(row) for row in self.calibration],
        }


def compute_metrics(predictions: pa.Table, *, classes: Sequence[str]) -> Metrics:
    """Compute the metrics of a table with ``PREDICTIONS_SCHEMA``, one row a sample.

    What cannot be divided is None and is left out of means: recall and precision of a class without
    samples or without predictions, F1 of a class without both. ``balanced_accuracy`` is the mean
    recall over classes that have samples, ``macro_f1`` the mean over classes that have an F1.

    Raises:
        DataError: the table is empty, or holds an index or a confidence out of range.
    """
    if predictions.num_rows == 0:
        raise DataError("no predictions to evaluate: the table is empty")
    label = predictions["label"].to_numpy().astype(np.int64)  # (N,)
    prediction = predictions["prediction"].to_numpy().astype(np.int64)  # (N,)
    confidence = predictions["confidence"].to_numpy().astype(np.float64)  # (N,)
    _check_range("label", label, lowest=0, highest=len(classes) - 1)
    _check_range("prediction", prediction, lowest=UNPREDICTED, highest=len(classes) - 1)
    _check_range("confidence", confidence, lowest=0, highest=1)

    confusion = _confusion(label, prediction, num_classes=len(classes))
    per_class = _per_class(confusion, np.bincount(label, minlength=len(classes)), classes=classes)
    calibration = _calibration(confidence, label == prediction)
    return Metrics(
        samples=len(label),
        loss=float(np.mean(predictions["loss"].to_numpy(), dtype=np.float64)),
        accuracy=int(confusion.trace()) / len(label),
        top5_accuracy=int(np.sum(predictions["label_rank"].to_numpy() < 5)) / len(label),
        balanced_accuracy=_mean(row["recall"] for row in per_class),
        macro_f1=_mean(row["f1"] for row in per_class),
        ece=_expected_calibration_error(calibration),
        confusion=confusion,
        per_class=per_class,
        calibration=calibration,
    )


def worst_mistakes(predictions: pa.Table, *, count: int = 24) -> pa.Table:
    """The wrong predictions with the highest confidence, ties by key, at most ``count``.

    Samples without a prediction are not among them.
    """
    wrong = pc.and_(
        pc.not_equal(predictions["prediction"], predictions["label"]),
        pc.greater(predictions["prediction"], pa.scalar(UNPREDICTED, pa.int32())),
    )
    ordered = predictions.filter(wrong).sort_by(
        [("confidence", "descending"), ("key", "ascending")]
    )
    return ordered.slice(0, count)


def predictions_from_logits(*, keys: Sequence[str], labels: Tensor, logits: Tensor) -> pa.Table:
    """Turn one batch of logits into rows of ``PREDICTIONS_SCHEMA``.

    A label's rank is the number of classes ahead of it: those with a higher logit, and those with
    an equal one and a lower index, as argmax breaks ties. So rank 0 and a right prediction are the
    same thing. Where the softmax is undefined (NaN or +inf among the logits) the prediction is
    ``UNPREDICTED`` with confidence 0, the rank ``UNRANKED`` and the loss NaN.

    Args:
        keys: B keys.
        labels: (B,) int64 class indices.
        logits: (B, K) of any float type; half precision is raised to float32 first.

    Raises:
        DataError: a label is not below K.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    num_classes = logits.shape[1]
    # Checked here: on a GPU an index out of range kills the process's CUDA context.
    _check_range("label", labels.cpu().numpy(), lowest=0, highest=num_classes - 1)

    log_probs = logits.log_softmax(dim=1)  # (B, K)
    undefined = log_probs.isnan().any(dim=1)  # (B,)
    prediction = logits.argmax(dim=1)  # (B,)
    rank = _label_rank(logits, labels)  # (B,)
    confidence = log_probs.amax(dim=1).exp()  # (B,)
    loss = -log_probs.gather(1, labels[:, None])[:, 0]  # (B,)
    columns = {
        "label": labels.int(),
        "prediction": prediction.int().masked_fill(undefined, UNPREDICTED),
        "confidence": confidence.float().masked_fill(undefined, 0.0),
        "loss": loss.float().masked_fill(undefined, math.nan),
        "label_rank": rank.int().masked_fill(undefined, UNRANKED),
    }
    arrays = {name: pa.array(column.cpu().numpy()) for name, column in columns.items()}
    return pa.table({"key": pa.array(keys, pa.string()), **arrays}, schema=PREDICTIONS_SCHEMA)


def _label_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of classes ahead of the label: (B, K), (B,) -> (B,)."""
    own = logits.gather(1, labels[:, None])  # (B, 1)
    is_earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]  # (B, K)
    return ((logits > own) | ((logits == own) & is_earlier)).sum(dim=1)


def _check_range(name: str, values: npt.NDArray[Any], *, lowest: int, highest: int) -> None:
    is_outside = ~((values >= lowest) & (values <= highest))  # NaN is outside, too
    if is_outside.any():
        row = int(is_outside.argmax())
        raise DataError(
            f"{name} {values[row]} in row {row} is not between {lowest} and {highest}",
            hint="evaluate with the classes that the predictions were made with",
        )


def _confusion(label: Counts, prediction: Counts, *, num_classes: int) -> Counts:
    """Counts of (label, prediction): (N,), (N,) -> (K, K)."""
    is_predicted = prediction != UNPREDICTED
    cell = label[is_predicted] * num_classes + prediction[is_predicted]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def _per_class(confusion: Counts, support: Counts, *, classes: Sequence[str]) -> list[ClassMetrics]:
    """Precision, recall and F1 = 2 TP / (support + predicted) of each class."""
    right = confusion.diagonal().tolist()
    predicted = confusion.sum(axis=0).tolist()
    return [
        ClassMetrics(
            label=name,
            support=num_samples,
            precision=_ratio(num_right, num_predicted),
            recall=_ratio(num_right, num_samples),
            f1=_ratio(2 * num_right, num_samples + num_predicted),
        )
        for name, num_samples, num_right, num_predicted in zip(
            classes, support.tolist(), right, predicted, strict=True
        )
    ]


def _calibration(confidence: Floats, is_right: npt.NDArray[np.bool_]) -> list[CalibrationBin]:
    """The samples of each equal-width bin of confidence, and how often they were right."""
    edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
    index = np.searchsorted(edges[1:-1], confidence, side="left")  # (N,): intervals (lower, upper]
    samples = np.bincount(index, minlength=NUM_CALIBRATION_BINS).tolist()
    confidence_sum = np.bincount(index, confidence, NUM_CALIBRATION_BINS).tolist()
    num_right = np.bincount(index, is_right, NUM_CALIBRATION_BINS).tolist()
    return [
        CalibrationBin(
            lower=float(edges[i]),
            upper=float(edges[i + 1]),
            samples=samples[i],
            confidence=_ratio(confidence_sum[i], samples[i]),
            accuracy=_ratio(num_right[i], samples[i]),
        )
        for i in range(NUM_CALIBRATION_BINS)
    ]


def _expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Mean over samples of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3)."""
    gaps = [
        row["samples"] * abs(row["accuracy"] - row["confidence"])
        for row in bins
        if row["accuracy"] is not None and row["confidence"] is not None
    ]
    return math.fsum(gaps) / sum(row["samples"] for row in bins)


def _ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)
