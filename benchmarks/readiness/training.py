"""The training step of cnnray's loop, in each precision, compiled and not."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np
import torch

from benchmarks.harness import Contestant, Figures
from benchmarks.readiness.subject import PeakMemory, Subject, build_classifier
from benchmarks.report import Column
from cnnray.training.compute import choose_precision, compile_in_place
from cnnray.training.loop import EpochData, EpochResult, Trainer, run_epochs
from cnnray.training.losses import build_loss
from cnnray.training.optimizers import build_optimizer

FIRST = "fp32"
VARIANTS = {
    FIRST: ("fp32", False),
    "bf16": ("bf16", False),
    "bf16, compiled": ("bf16", True),
    "fp32, compiled": ("fp32", True),
}
COLUMNS = (
    Column("step_ms", "step, ms", 1),
    Column("images_per_second", "images/s"),
    Column("speedup", "over fp32", 2),
    Column("loss", "loss of the first steps", 4),
    Column("peak_mb", "peak memory, MB"),
)
LEARNING_RATE = 0.01
WARM_UP_STEPS = 4
MOST_STEPS = 500


def training_contestants(subject: Subject) -> list[Contestant]:
    """A training step in each variant; speed-ups are over the first one."""
    rates: dict[str, float] = {}

    def contestant(name: str, precision: str, is_compiled: bool) -> Contestant:
        def run() -> Figures:
            memory = PeakMemory(subject.device)
            first, last = _train(subject, precision, is_compiled=is_compiled)
            rates[name] = last.samples_per_second
            figures = {
                "step_ms": 1000 * _batch_size(subject) / last.samples_per_second,
                "images_per_second": last.samples_per_second,
                "loss": first.train_loss,
                "peak_mb": memory.megabytes(),
            }
            return figures | ({"speedup": rates[name] / rates[FIRST]} if FIRST in rates else {})

        return Contestant(name, run)

    return [contestant(name, *variant) for name, variant in VARIANTS.items()]


def _train(
    subject: Subject, precision: str, *, is_compiled: bool
) -> tuple[EpochResult, EpochResult]:
    """The first steps, in which all is compiled, and steps enough for ``subject.seconds``."""
    model = build_classifier(subject.bundle.spec)
    model = model.to(subject.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if is_compiled:
        compile_in_place(model)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, name="sgd", lr=LEARNING_RATE),
        loss=build_loss("cross_entropy"),
        learning_rate=lambda step: LEARNING_RATE,
        device=subject.device,
        precision=choose_precision(precision, subject.device),
    )
    size = _batch_size(subject)
    batches = cycle(subject.batches(size))
    results: list[EpochResult] = []

    def data(epoch: int) -> EpochData:
        steps = WARM_UP_STEPS  # of the second epoch it is known how long they take
        if epoch == 2:
            steps = int(subject.seconds * results[-1].samples_per_second / size)
        steps = min(max(steps, WARM_UP_STEPS), MOST_STEPS)
        return EpochData(islice(batches, steps), np.full(steps, size), validation=())

    for result in run_epochs(trainer, first_epoch=0, epochs=3, data=data, seed=0):
        assert isinstance(result, EpochResult)
        results.append(result)
    return results[0], results[-1]


def _batch_size(subject: Subject) -> int:
    return min(subject.batch_size, len(subject.labels))
