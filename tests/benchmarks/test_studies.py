"""Studies: the images that they take, and the intervals that they print."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import Results
from benchmarks.imbalance import tail
from benchmarks.studies import first_of_each, intervals


def test_a_tail_falls_from_the_most_to_the_ratio_by_the_same_factor():
    counts = tail(most=6_000, ratio=100, classes=10)
    assert (counts[0], counts[-1]) == (6_000, 60)
    assert np.allclose(np.divide(counts[1:], counts[:-1]), 100 ** (-1 / 9), atol=0.01)


def test_the_first_images_of_each_class_stay_in_the_order_of_the_set():
    labels = np.array([0, 1, 0, 1, 0, 2])
    pixels = np.arange(6)[:, None, None]
    chosen, of_classes = first_of_each(pixels, labels, [2, 1, 1])
    assert chosen.ravel().tolist() == [0, 1, 2, 5]
    assert of_classes.tolist() == [0, 1, 0, 2]


def test_intervals_are_those_of_student_and_gains_are_paired_by_seed():
    results = Results(
        {
            "none": [{"accuracy": value} for value in (0.70, 0.72, 0.74)],
            "focal": [{"accuracy": value} for value in (0.75, 0.77, 0.79)],
        }
    )
    plain, focal = intervals(results, "accuracy", baseline="none")
    assert plain == "accuracy: none: 0.7200 ± 0.0497"  # 4.303 x 0.02 / sqrt 3
    assert focal == "accuracy: focal: 0.7700 ± 0.0497, over none +0.0500 ± 0.0000"


def test_one_seed_has_no_interval():
    results = Results({"none": [{"accuracy": 0.7}], "focal": [{"accuracy": 0.8}]})
    assert intervals(results, "accuracy", baseline="none") == [
        "accuracy: none: 0.7000",
        "accuracy: focal: 0.8000, over none +0.1000",
    ]


@pytest.mark.parametrize("study", ["imbalance", "overfitting", "model_selection"])
def test_a_study_without_its_data_says_so(study, tmp_path):
    from importlib import import_module

    from benchmarks.harness import SkipBenchmark

    with pytest.raises(SkipBenchmark, match="dataset-fashion-mnist"):
        import_module(f"benchmarks.{study}").main(["--short", "--data", str(tmp_path)])
