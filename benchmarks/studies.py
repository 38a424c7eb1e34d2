"""Studies: the same training with and without a remedy, over seeds, judged on the test split.

A study's rounds are its seeds. Runs share one Ray and one process; what is compared is accuracy, so
start-up does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Contestant, Figures, Results, note
from benchmarks.options import make_parser, scratch_folder
from benchmarks.peers.fashion_mnist import Labels, Pixels, read_split, write_split
from benchmarks.report import Column
from benchmarks.training import add_fashion_mnist, find_fashion_mnist
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.cluster.train.job import train
from cnnray.config import ClusterSettings, EvaluateSettings, PackSettings, TrainSettings

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t, two-sided 95 %, by the number of seeds."""

BALANCED, ACCURACY = "balanced_accuracy", "test_accuracy"
COLUMNS = (
    Column(ACCURACY, "test accuracy", 4),
    Column(BALANCED, "balanced", 4),
    Column("worst_recall", "worst class", 3),
    Column("train_accuracy", "training accuracy", 4),
    Column("seconds", "seconds", 0),
)


@dataclass
class Study:
    """A packed dataset, settings that all runs share, and a folder for what they write."""

    data: Path
    scratch: Path
    settings: Mapping[str, Any]
    findings: dict[str, list[list[str]]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def contestant(self, name: str, **changes: Any) -> Contestant:
        """A run with other settings, each time with the next seed."""
        seeds = itertools.count()

        def run() -> Figures:
            return self._run(name, {**self.settings, **changes, "seed": next(seeds)})

        return Contestant(name, run)

    def _run(self, name: str, settings: Mapping[str, Any]) -> Figures:
        folder = self.scratch / f"run-{next(self.numbers):03d}"
        started = time.monotonic()
        trained = train(
            TrainSettings(data=str(self.data), output=str(folder / "model"), **settings)
        )
        seconds = time.monotonic() - started
        tested = evaluate(
            EvaluateSettings(
                model=str(folder / "model"), data=str(self.data), output=str(folder / "test")
            )
        )
        metrics = json.loads((folder / "test/metrics.json").read_text(encoding="utf-8"))
        document = json.loads((folder / "model/model.json").read_text(encoding="utf-8"))
        history = document["provenance"]["history"]
        self.findings.setdefault(name, []).append(
            [finding["name"] for finding in trained["diagnosis"]]
        )
        shutil.rmtree(folder)
        return {
            ACCURACY: tested["accuracy"],
            BALANCED: metrics[BALANCED],
            "worst_recall": min(row["recall"] for row in metrics["per_class"]),
            "train_accuracy": history[trained["best_epoch"] - 1]["train_accuracy"],
            "seconds": seconds,
        }


def study_parser(description: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """The flags of a study; its rounds are its seeds."""
    parser = make_parser(description, repeats=repeats)
    add_fashion_mnist(parser)
    return parser


@contextlib.contextmanager
def open_study(
    options: argparse.Namespace, counts: Sequence[int], settings: Mapping[str, Any]
) -> Iterator[Study]:
    """Fashion-MNIST with so many training images of each class, its whole test split, and a Ray."""
    source = str(find_fashion_mnist(options.data))
    with scratch_folder(options.scratch) as scratch, ray_cluster(ClusterSettings()):
        images = scratch / "idx"
        images.mkdir()
        pixels, labels = read_split(source, "train")
        write_split(images, "train", *first_of_each(pixels, labels, counts))
        write_split(images, "t10k", *read_split(source, "t10k"))
        note(f"packing {sum(counts):,} images")
        data = scratch / "dataset"
        # A tenth to validate on: of the rarest class there should be some there, too.
        pack(PackSettings(input=str(images), output=str(data), split={"val": 0.1, "test": 0.0}))
        yield Study(data, scratch, settings)


def first_of_each(pixels: Pixels, labels: Labels, counts: Sequence[int]) -> tuple[Pixels, Labels]:
    """The first images of each class, in the order of the set."""
    places = np.sort(
        np.concatenate([np.flatnonzero(labels == k)[:count] for k, count in enumerate(counts)])
    )
    return pixels[places], labels[places]


def intervals(results: Results, figure: str, *, baseline: str) -> list[str]:
    """A line a contestant: mean and 95 % interval over the seeds, and over the baseline, paired."""
    base = results.summary(baseline, figure)
    lines = []
    for name in results.rounds:
        summary = results.summary(name, figure)
        if summary is None or base is None:
            continue
        line = f"{figure}: {name}: {_interval(summary.runs)}"
        if name != baseline:
            gains = [a - b for a, b in zip(summary.runs, base.runs, strict=True)]
            line += f", over {baseline} {_interval(gains, sign='+')}"
        lines.append(line)
    return lines


def _interval(values: Sequence[float], *, sign: str = "") -> str:
    """``0.812 ± 0.004``: the mean, and half the width of its 95 % interval by Student's t."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    if len(values) not in T_95:
        return mean
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.4f}"
