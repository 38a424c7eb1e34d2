"""S1: what helps against a long tail, over 3 seeds.

Fashion-MNIST whose classes have 6,000 down to 60 training images (1:100, each class 0.6 times the
one before), the whole balanced test split, the tutorial's network. Every method of
``--imbalance.method`` against plain cross-entropy; the goal is 3 points of balanced accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from benchmarks.harness import race, run_benchmark
from benchmarks.options import select, settle
from benchmarks.report import Report, describe_machine, publish
from benchmarks.studies import BALANCED, COLUMNS, intervals, open_study, study_parser
from cnnray.config import ImbalanceSettings

PLAIN = "none"
SETTINGS: dict[str, Any] = {
    "model": {"name": "tutorial_cnn"},
    "augment": {"flip": 0.5, "crop": "random_pad", "pad": 2},
    "schedule": {"name": "cosine"},
    "global_batch_size": 128,
}
EPOCHS = {False: 15, True: 2}  # of the full and of the short form


def tail(*, most: int, ratio: float, classes: int) -> list[int]:
    """Images of each class, falling evenly in their logarithm (Cui et al. 2019)."""
    return [round(most * ratio ** (-k / (classes - 1))) for k in range(classes)]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, and return the exit code."""
    options = settle(study_parser(__doc__).parse_args(argv))
    machine = describe_machine()
    counts = tail(most=600 if options.short else 6_000, ratio=100, classes=10)
    epochs = EPOCHS[options.short]
    with open_study(options, counts, {**SETTINGS, "epochs": epochs}) as study:
        methods = get_args(ImbalanceSettings.model_fields["method"].annotation)
        contestants = [study.contestant(method, imbalance={"method": method}) for method in methods]
        results = race(select(contestants, options.only), repeats=options.repeats)
    report = Report(
        benchmark="imbalance, Fashion-MNIST with a long tail of 1:100 (S1)",
        results=results,
        columns=COLUMNS,
        settings={"images": sum(counts), "epochs": epochs, "seeds": options.repeats},
        remarks=intervals(results, BALANCED, baseline=PLAIN),
    )
    return publish(report, machine)


if __name__ == "__main__":
    run_benchmark(main)
