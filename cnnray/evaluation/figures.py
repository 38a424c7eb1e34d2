"""The report's figures as PNG bytes: drawn on a canvas of their own, without global state.

The ink is chosen for a light, transparent ground; the page inverts the figures in dark mode. Only
blue and grey are used, told apart by lightness as well as by hue.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cnnray.evaluation.metrics import CalibrationBin, ClassMetrics, Counts, Floats

INK, MUTED, GRID, ACCENT = "#24292f", "#6b7480", "#e3e7ec", "#1f6fb5"
SCALE = LinearSegmentedColormap.from_list("share", ["#f4f7fa", "#a9cdea", "#1f6fb5", "#0b2f57"])
DPI = 160  # twice what a page shows, for sharp text
FONT_SIZE = 9
MAX_CLASSES_WITH_COUNTS = 20
MAX_CLASSES_WITH_NAMES = 40
MAX_RECALL_BARS = 40
MAX_NAME_CHARACTERS = 24


def printable(text: str, *, max_characters: int = 200) -> str:
    r"""One line of visible text: other characters are shown as escapes (``\n``, ``\x1b``).

    Escaped are control and bidirectional-override characters, unpaired surrogates and every
    space but the ordinary one; joiners stay, since scripts and emoji need them.
    """
    line = "".join(
        char
        if char.isprintable() or char in "\u200c\u200d"
        else char.encode("unicode_escape").decode()
        for char in text[: max_characters + 1]
    )
    return line if len(line) <= max_characters else line[: max_characters - 1] + "…"


def history_curves(
    history: Sequence[Mapping[str, Any]], *, series: Mapping[str, str], percent: bool = False
) -> bytes | None:
    """Draw columns of the history over epochs; None when no value is finite.

    ``series`` maps the name in the legend to the column; the last one is drawn as the main one.
    """
    curves = {name: _column(history, column) for name, column in series.items()}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        return None
    epochs = _column(history, "epoch")
    figure, axes = _figure(width=4.2, height=2.7)
    for position, (name, values) in enumerate(curves.items(), start=1):
        is_main = position == len(curves)
        axes.plot(
            epochs,
            values,
            label=name,
            color=ACCENT if is_main else MUTED,
            linewidth=2 if is_main else 1.4,
            linestyle="-" if is_main else (0, (4, 2)),
            marker="o" if len(history) == 1 else None,
        )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=FONT_SIZE, labelcolor=INK)
    return _png(figure)


def accuracy_against_cost(
    seconds: Sequence[float], accuracy: Sequence[float], *, names: Sequence[str]
) -> bytes | None:
    """Draw a dot a trial, with its name beside it where it has one; None without any trial."""
    if not seconds:
        return None
    figure, axes = _figure(width=6.4, height=3.4)
    axes.scatter(seconds, accuracy, s=40, color=[ACCENT if name else MUTED for name in names])
    for x, y, name in zip(seconds, accuracy, names, strict=True):
        axes.annotate(
            name, (x, y), xytext=(7, -3), textcoords="offset points", color=INK, fontsize=FONT_SIZE
        )
    axes.set_xlabel("seconds of training, over all workers")
    axes.set_ylabel("validation accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.margins(x=0.15)
    return _png(figure)


def confusion_matrix(confusion: Counts, *, classes: Sequence[str]) -> bytes:
    """Draw a (K, K) matrix; colour is the share of the row's, that is the label's, samples."""
    num_classes = len(classes)
    support = confusion.sum(axis=1, keepdims=True)  # (K, 1)
    share = confusion / np.maximum(support, 1)  # (K, K)
    longest_name = min(max(map(len, classes)), MAX_NAME_CHARACTERS)
    side = min(max(3.6, 1.4 + 0.34 * num_classes + 0.06 * longest_name), 8.0)  # inches
    figure, axes = _figure(width=side + 0.8, height=side)
    # The square root lifts a confusion of one per cent into sight.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    figure.set_layout_engine("compressed")  # the axes keep their aspect: leave no room beside them
    image = axes.imshow(share, cmap=SCALE, norm=norm, interpolation_stage="data")
    axes.grid(visible=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if num_classes <= MAX_CLASSES_WITH_NAMES:
        _name_ticks(axes, classes=classes)
        _separate_cells(axes, num_classes=num_classes)
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        _write_counts(axes, confusion=confusion, share=share)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.03, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    _style_ticks(bar.ax)
    bar.set_label("share of the label's samples", color=MUTED, fontsize=FONT_SIZE)
    return _png(figure)


def reliability_diagram(calibration: Sequence[CalibrationBin]) -> bytes:
    """Draw accuracy over confidence, and below it how many samples each bin holds."""
    lower = [row["lower"] for row in calibration]
    width = [row["upper"] - row["lower"] for row in calibration]
    accuracy = [row["accuracy"] or 0.0 for row in calibration]
    samples = np.array([row["samples"] for row in calibration])

    figure, axes = _figure(width=4.6, height=4.6)
    axes.remove()
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    for part in (axes, counts):
        _style(part)
        part.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bars = {"align": "edge", "edgecolor": "white", "linewidth": 1.2}
    axes.bar(lower, accuracy, width, color=ACCENT, **bars)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    counts.bar(lower, samples / samples.sum(), width, color=MUTED, **bars)
    counts.set(xlabel="confidence", ylabel="samples")
    counts.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counts.yaxis.set_major_locator(MaxNLocator(2, prune="lower"))
    figure.align_ylabels()
    return _png(figure)


def recall_bars(per_class: Sequence[ClassMetrics]) -> bytes:
    """Draw the recall of the classes that have samples, lowest first; the 40 lowest of more."""
    known = [
        (row["recall"], index) for index, row in enumerate(per_class) if row["recall"] is not None
    ]
    worst = sorted(known)[:MAX_RECALL_BARS]
    names = [_drawable(per_class[index]["label"], index=index) for _, index in worst]
    recall = [value for value, _ in worst]
    figure, axes = _figure(width=5.4, height=0.3 + 0.24 * len(worst))
    axes.barh(range(len(worst)), [1.0] * len(worst), color=GRID, height=0.62)
    axes.barh(range(len(worst)), recall, color=ACCENT, height=0.62)
    for position, value in enumerate(recall):
        axes.text(
            1.015,
            position,
            f"{value:.1%}",
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            clip_on=False,
        )
    axes.set_yticks(range(len(worst)), names, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(len(worst) - 0.4, -0.6), xticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return _png(figure)


def _figure(*, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches, and its axes in the common style."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="none", layout="constrained")
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.xaxis.label.set(color=MUTED, fontsize=FONT_SIZE)
    axes.yaxis.label.set(color=MUTED, fontsize=FONT_SIZE)
    _style_ticks(axes)


def _style_ticks(axes: Axes) -> None:
    axes.tick_params(length=0, labelcolor=INK, labelsize=FONT_SIZE)


def _name_ticks(axes: Axes, *, classes: Sequence[str]) -> None:
    names = [_drawable(name, index=index) for index, name in enumerate(classes)]
    size = FONT_SIZE if len(classes) <= MAX_CLASSES_WITH_COUNTS else FONT_SIZE - 3
    axes.set_xticks(range(len(names)), names, fontsize=size, parse_math=False)
    if max(map(len, names)) > max(3, 20 // len(names)):
        for tick in axes.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)


def _separate_cells(axes: Axes, *, num_classes: int) -> None:
    """Leave white gaps between cells."""
    edges = np.arange(num_classes + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(visible=True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _write_counts(axes: Axes, *, confusion: Counts, share: Floats) -> None:
    for row, column in np.argwhere(confusion > 0):
        axes.text(
            column,
            row,
            _short_count(int(confusion[row, column])),
            ha="center",
            va="center",
            color="white" if share[row, column] > 0.25 else INK,
            fontsize=FONT_SIZE if len(confusion) <= 10 else FONT_SIZE - 2.5,
        )


def _short_count(count: int) -> str:
    """At most four characters for counts below 10 million: 9999, 12k, 1.2M."""
    if count < 10_000:
        return str(count)
    if count < 999_500:
        return f"{count / 1_000:.0f}k"
    return f"{count / 1_000_000:.1f}M" if count < 9_950_000 else f"{count / 1_000_000:.0f}M"


def _drawable(name: str, *, index: int) -> str:
    """The class's name, or its number where the font lacks a character or nothing is visible."""
    text = printable(name, max_characters=MAX_NAME_CHARACTERS)
    font = FT2Font(font_manager.findfont("DejaVu Sans"))
    has_glyphs = all(font.get_char_index(ord(char)) for char in text)
    return text if text.strip() and has_glyphs else f"#{index}"


def _column(history: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """One column of the history, NaN where it has no value."""
    values = [row.get(name) for row in history]
    return np.array([math.nan if value is None else float(value) for value in values])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
