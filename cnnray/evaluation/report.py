"""One self-contained HTML file that shows how good a model is, and where it fails."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnray.evaluation import figures
from cnnray.evaluation.findings import Finding
from cnnray.evaluation.metrics import NUM_CALIBRATION_BINS, Metrics
from cnnray.evaluation.pages import Picture, data_uri, percent, picture, render_page

MAX_CONFUSED_PAIRS = 12
MAX_THUMBNAIL_PIXELS = 128
MAX_LOSSLESS_PIXELS = 64  # smaller images are PNG, and enlarged without smoothing


@dataclass(frozen=True, eq=False)
class Mistake:
    """One wrong prediction: class names, and an (H, W, C) uint8 image or None."""

    key: str
    label: str
    prediction: str
    confidence: float
    thumbnail: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class _ConfusedPair:
    label: str
    prediction: str
    samples: int
    share: float


def render_report(
    *,
    title: str,
    metrics: Metrics,
    history: Sequence[Mapping[str, Any]],
    mistakes: Sequence[Mistake],
    diagnosis: Sequence[Finding],
    facts: Mapping[str, str],
) -> str:
    """Render the report as one HTML document that may be mailed, printed or opened offline.

    Args:
        history: one mapping an epoch: epoch, train_loss, val_loss, train_accuracy, val_accuracy,
            learning_rate; without any the learning curves are left out.
        diagnosis: what the doctor found.
        facts: what was evaluated, in the order to show: model, data, digests, versions.
    """
    classes = [row["label"] for row in metrics.per_class]
    return render_page(
        "report.html.j2",
        title=title,
        metrics=metrics,
        tiles=_tiles(metrics),
        curves=_curves(history),
        diagnosis=diagnosis,
        confusion=picture(figures.confusion_matrix(metrics.confusion, classes=classes)),
        pairs=_confused_pairs(metrics),
        recall=picture(figures.recall_bars(metrics.per_class)),
        num_recall_bars=figures.MAX_RECALL_BARS,
        reliability=picture(figures.reliability_diagram(metrics.calibration)),
        mean_confidence=_mean_confidence(metrics),
        mistakes=[(mistake, _thumbnail(mistake.thumbnail)) for mistake in mistakes],
        facts=facts,
    )


def _tiles(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Name, value and explanation of each headline number."""
    loss = f"{metrics.loss:.3f}" if math.isfinite(metrics.loss) else "not finite"
    return [
        ("Accuracy", percent(metrics.accuracy), "predictions that are right"),
        ("Top-5 accuracy", percent(metrics.top5_accuracy), "label among the five likeliest"),
        ("Balanced accuracy", percent(metrics.balanced_accuracy), "mean recall of the classes"),
        ("Loss", loss, "mean cross-entropy"),
        ("ECE", percent(metrics.ece), f"calibration error, {NUM_CALIBRATION_BINS} bins"),
        ("Samples", f"{metrics.samples:,}", f"in {len(metrics.per_class):,} classes"),
    ]


def _curves(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Picture]]:
    """The learning curves that the history has values for, each with its name."""
    loss = figures.history_curves(
        history, series={"training": "train_loss", "validation": "val_loss"}
    )
    accuracy = figures.history_curves(
        history, series={"training": "train_accuracy", "validation": "val_accuracy"}, percent=True
    )
    rate = figures.history_curves(history, series={"learning rate": "learning_rate"})
    named = {"Loss": loss, "Accuracy": accuracy, "Learning rate": rate}
    return [(name, picture(png)) for name, png in named.items() if png is not None]


def _confused_pairs(metrics: Metrics) -> list[_ConfusedPair]:
    """The off-diagonal cells with the most samples; ties in the order of the classes."""
    wrong = metrics.confusion.copy()
    np.fill_diagonal(wrong, 0)
    cells = wrong.ravel()
    order = np.argsort(-cells, kind="stable")[:MAX_CONFUSED_PAIRS]
    pairs = []
    for cell in order[cells[order] > 0].tolist():
        label, prediction = divmod(cell, len(wrong))
        pairs.append(
            _ConfusedPair(
                label=metrics.per_class[label]["label"],
                prediction=metrics.per_class[prediction]["label"],
                samples=int(cells[cell]),
                share=int(cells[cell]) / metrics.per_class[label]["support"],
            )
        )
    return pairs


def _mean_confidence(metrics: Metrics) -> float:
    total = math.fsum((row["confidence"] or 0.0) * row["samples"] for row in metrics.calibration)
    return total / metrics.samples


def _thumbnail(image: npt.NDArray[np.uint8] | None) -> Picture | None:
    """A small copy; images of neither one nor three channels show their first one or three."""
    if image is None or image.size == 0:
        return None
    pixels = image[..., :3] if image.shape[2] >= 3 else image[..., 0]
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((MAX_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS))
    is_lossless = max(small.size) <= MAX_LOSSLESS_PIXELS
    buffer = io.BytesIO()
    if is_lossless:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=85)
    return Picture(data_uri(buffer.getvalue(), kind="png" if is_lossless else "jpeg"), *small.size)
