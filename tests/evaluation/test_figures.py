import io
import math

import numpy as np
import pytest
from PIL import Image

from cnnray.evaluation.figures import (
    confusion_matrix,
    history_curves,
    printable,
    recall_bars,
    reliability_diagram,
)
from cnnray.evaluation.metrics import CalibrationBin, ClassMetrics

ODD_NAMES = ["$\\frac{", "\x1b[31m\n", "", "马", "x" * 10_000, "\ud800"]


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def class_metrics(name, recall):
    return ClassMetrics(label=name, support=10, precision=0.5, recall=recall, f1=0.5)


def test_history_curves_are_a_png_even_with_gaps():
    history = [
        {"epoch": 1, "train_loss": 2.0, "val_loss": None},
        {"epoch": 2, "train_loss": math.nan, "val_loss": 1.0},
    ]
    png = history_curves(history, series={"training": "train_loss", "validation": "val_loss"})
    assert png is not None
    assert size_of(png) == (672, 432)  # 4.2 x 2.7 inches at 160 dots an inch


@pytest.mark.parametrize("history", [[], [{"epoch": 1}], [{"epoch": 1, "val_loss": math.nan}]])
def test_history_without_values_has_no_curve(history):
    assert history_curves(history, series={"validation": "val_loss"}) is None


@pytest.mark.parametrize("num_classes", [1, 2, 10, 30, 100])
def test_confusion_matrix_is_a_png_of_readable_size(num_classes):
    confusion = np.eye(num_classes, dtype=np.int64) * 12_345
    confusion[0] = 0  # a class without samples
    png = confusion_matrix(confusion, classes=[f"class {i}" for i in range(num_classes)])
    width, height = size_of(png)
    assert 400 < height <= 1280  # at most 8 inches
    assert width > height


def test_names_that_fonts_cannot_draw_make_no_error_and_no_warning(recwarn):
    size_of(confusion_matrix(np.eye(6, dtype=np.int64), classes=ODD_NAMES))
    size_of(recall_bars([class_metrics(name, 0.5) for name in ODD_NAMES]))
    assert not [str(warning.message) for warning in recwarn]


def test_recall_bars_show_at_most_forty_classes():
    png = recall_bars([class_metrics(f"class {i}", i / 100) for i in range(100)])
    assert size_of(png)[1] == round((0.3 + 0.24 * 40) * 160)  # inches at 160 dots: 40 bars


def test_recall_bars_leave_out_classes_without_samples():
    cat = class_metrics("cat", 0.5)
    fox = ClassMetrics(label="fox", support=0, precision=None, recall=None, f1=None)
    assert recall_bars([cat, fox]) == recall_bars([cat])


def test_reliability_diagram_is_a_png_with_empty_bins():
    bins = [
        CalibrationBin(lower=0.0, upper=0.5, samples=0, confidence=None, accuracy=None),
        CalibrationBin(lower=0.5, upper=1.0, samples=9, confidence=0.8, accuracy=0.7),
    ]
    size_of(reliability_diagram(bins))


def test_printable_escapes_what_cannot_be_seen():
    assert printable("a\x1b[0m\n\u202e\udcff\u2028é 马") == "a\\x1b[0m\\n\\u202e\\udcff\\u2028é 马"


def test_printable_shortens_after_escaping():
    assert printable("x" * 9, max_characters=8) == "xxxxxxx…"
    assert printable("x" * 8, max_characters=8) == "x" * 8
    assert len(printable("\x00" * 1000, max_characters=8)) == 8
