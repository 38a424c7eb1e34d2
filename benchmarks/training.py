"""Contestants that train: cnnray's jobs as users run them, and programs of ``benchmarks.peers``."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Contestant, ContestantFailed, Figures, SkipBenchmark, note
from benchmarks.processes import Finished, run_process
from benchmarks.report import Column

COLUMNS = (
    Column("samples_per_second", "samples/s", 1),
    Column("data_wait_fraction", "waiting", 3),
    Column("epochs_seconds", "all epochs, s", 1),
    Column("seconds", "whole run, s", 1),
    Column("test_accuracy", "test accuracy", 4),
)
DEADLINE_SECONDS = 7200.0


DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Of Debian's package dataset-fashion-mnist."""


@dataclass(frozen=True)
class Dataset:
    """A packed dataset, and a scratch folder for what is trained on it."""

    folder: Path
    num_train: int
    num_classes: int
    scratch: Path
    runs: Iterator[int] = field(default_factory=itertools.count)


def add_fashion_mnist(parser: argparse.ArgumentParser) -> None:
    """``--data FOLDER``, where Fashion-MNIST is."""
    parser.add_argument("--data", metavar="FOLDER", default=DEBIAN_FOLDER, help="gzipped IDX files")


def find_fashion_mnist(folder: str) -> Path:
    """The folder, if it has the set. Raises ``SkipBenchmark``."""
    if not (Path(folder) / "train-images-idx3-ubyte.gz").is_file():
        raise SkipBenchmark(f"no Fashion-MNIST in {folder}: apt install dataset-fashion-mnist")
    return Path(folder)


def pack(images: Path, scratch: Path, *flags: str) -> Dataset:
    """Pack images with ``jobs/pack.py``; no part of what is measured."""
    note(f"packing {images}")
    folder = scratch / "dataset"
    command = [sys.executable, "jobs/pack.py", f"--input={images}", f"--output={folder}", *flags]
    result = run_process(command, seconds=DEADLINE_SECONDS).result
    return Dataset(folder, result["splits"]["train"], result["classes"], scratch)


def train_job(
    dataset: Dataset, name: str, recipe: str, *flags: str, evaluated: bool = False
) -> Contestant:
    """``jobs/train.py`` with one of the recipes; if asked, ``jobs/evaluate.py`` after it."""

    def run() -> Figures:
        output = dataset.scratch / f"model-{next(dataset.runs):03d}"
        command = [sys.executable, "jobs/train.py", f"--config=jobs/configs/{recipe}.yaml"]
        command += [f"--data={dataset.folder}", f"--output={output}", *flags]
        finished = run_process(command, seconds=DEADLINE_SECONDS)
        figures = history_figures(read_history(output)) | {"seconds": finished.seconds}
        if evaluated:
            figures["test_accuracy"] = accuracy_on_test(dataset, output)
        shutil.rmtree(output)
        return figures

    return Contestant(name, run)


def read_history(bundle: Path) -> list[dict[str, Any]]:
    """What the job wrote down of each epoch."""
    document = json.loads((bundle / "model.json").read_text(encoding="utf-8"))
    history: list[dict[str, Any]] = document["provenance"]["history"]
    return history


def history_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the epochs, so that the start of the first one does not count."""
    figures = {
        name: statistics.median(epoch[name] for epoch in history)
        for name in ("samples_per_second", "data_wait_fraction")
    }
    return figures | {"epochs_seconds": sum(epoch["seconds"] for epoch in history)}


def training_peer(name: str, module: str, *flags: str, python: str = sys.executable) -> Contestant:
    """A program that prints the samples a second of its epochs as JSON."""

    def run() -> Figures:
        command = [python, "-m", f"benchmarks.peers.{module}", *flags]
        return peer_figures(run_process(command, seconds=DEADLINE_SECONDS))

    return Contestant(name, run)


def peer_figures(finished: Finished) -> dict[str, float]:
    """The same figures as cnnray's, as far as a peer has them."""
    if "samples_per_second" not in finished.result:
        raise ContestantFailed("it printed no result")
    figures = dict(finished.result)
    rates = figures.pop("samples_per_second")
    return {**figures, "samples_per_second": statistics.median(rates), "seconds": finished.seconds}


def accuracy_on_test(dataset: Dataset, bundle: Path) -> float:
    """Accuracy of a bundle on the test split, by ``jobs/evaluate.py``."""
    command = [sys.executable, "jobs/evaluate.py", f"--model={bundle}", f"--data={dataset.folder}"]
    output = bundle / "evaluation"
    result = run_process([*command, f"--output={output}"], seconds=DEADLINE_SECONDS).result
    return float(result["accuracy"])
