"""S2: what helps when there is little data, and whether the doctor sees it, over 3 seeds.

2 % of Fashion-MNIST (120 training images of each class), the whole test split: the same network
without anything, with augmentation, with regularisation, and with both; the goal is 3 points of
test accuracy. "findings" is what the doctor said after each training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import race, run_benchmark
from benchmarks.options import select, settle
from benchmarks.report import Report, describe_machine, publish
from benchmarks.studies import ACCURACY, COLUMNS, intervals, open_study, study_parser

PLAIN = "nothing"
SETTINGS: dict[str, Any] = {
    "model": {"name": "tutorial_cnn"},
    "optimizer": {"lr": 0.002},
    "schedule": {"name": "cosine"},
    "global_batch_size": 32,
}
AUGMENTATION: dict[str, Any] = {
    "augment": {"flip": 0.5, "crop": "random_pad", "pad": 1, "erasing": 0.3},
}
REGULARISATION: dict[str, Any] = {
    "loss": {"label_smoothing": 0.1},
    "optimizer": {"name": "adamw", "lr": 0.002, "weight_decay": 0.05},
    "mix": {"mixup_alpha": 0.4},
    "ema": {"decay": 0.995},
}
EPOCHS = {False: 200, True: 2}  # of the full and of the short form; changed images take long


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, and return the exit code."""
    options = settle(study_parser(__doc__).parse_args(argv))
    machine = describe_machine()
    epochs = EPOCHS[options.short]
    with open_study(options, [120] * 10, {**SETTINGS, "epochs": epochs}) as study:
        contestants = [
            study.contestant(PLAIN),
            study.contestant("augmentation", **AUGMENTATION),
            study.contestant("regularisation", **REGULARISATION),
            study.contestant("both", **AUGMENTATION, **REGULARISATION),
        ]
        results = race(select(contestants, options.only), repeats=options.repeats)
    findings = [f"findings: {name}: {found}" for name, found in study.findings.items()]
    report = Report(
        benchmark="overfitting, 2 % of Fashion-MNIST (S2)",
        results=results,
        columns=COLUMNS,
        settings={"images": 1_200, "epochs": epochs, "seeds": options.repeats},
        remarks=[*intervals(results, ACCURACY, baseline=PLAIN), *findings],
        extra={"findings": study.findings},
    )
    return publish(report, machine)


if __name__ == "__main__":
    run_benchmark(main)
