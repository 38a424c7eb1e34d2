"""S3: a search over 8 settings, killed in the middle and gone on with.

The first 6,000 images of Fashion-MNIST, the tutorial's network or small_cnn, learning rate, batch
size and augmentation: ``jobs/tune.py`` with 8 trials, killed (SIGKILL) once three are over, and
submitted again. The best bundle and that of the settings as given are then judged on the test
split. The goals: the best one is better, and no trial that was over ran again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Contestant, ContestantFailed, Figures, note, race, run_benchmark
from benchmarks.options import add_count, scratch_folder, settle
from benchmarks.peers.fashion_mnist import write_part
from benchmarks.processes import run_process
from benchmarks.report import Column, Report, describe_machine, publish
from benchmarks.studies import study_parser
from benchmarks.training import Dataset, accuracy_on_test, find_fashion_mnist, pack

SPACE = """\
model.name: [tutorial_cnn, small_cnn]
optimizer.lr: {min: 0.0003, max: 0.01, log: true}
global_batch_size: [32, 64, 128]
augment.crop: [center, random_pad]
"""
FLAGS = ["--augment.flip=0.5", "--schedule.name=cosine", "--model.name=tutorial_cnn"]
OVER = 3
"""Trials that are over when the job is killed."""
SECONDS = 3600.0
COLUMNS = (
    Column("val_accuracy", "validation accuracy", 4),
    Column("test_accuracy", "test accuracy", 4),
    Column("seconds", "seconds", 0),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Search, print, and return the exit code."""
    parser = study_parser(__doc__, repeats=1)
    add_count(parser, "--epochs", full=6, short=2, what="epochs of a trial")
    add_count(parser, "--trials", full=8, short=4, what="trials")
    options = settle(parser.parse_args(argv))
    machine = describe_machine()
    with scratch_folder(options.scratch) as scratch:
        images = scratch / "idx"
        images.mkdir()
        for split in ("train", "t10k"):
            write_part(find_fashion_mnist(options.data), images, split=split, images=6_000)
        dataset = pack(images, scratch, "--split.val=0.2")
        found: dict[str, Any] = {}
        contestants = [
            Contestant("best of the search", lambda: _search(dataset, options, found)),
            Contestant("settings as given", lambda: _as_given(dataset, options, found)),
        ]
        results = race(contestants, repeats=options.repeats)
    report = Report(
        benchmark="model selection, Fashion-MNIST (S3)",
        results=results,
        columns=COLUMNS,
        settings={"images": dataset.num_train, "trials": options.trials, "epochs": options.epochs},
        remarks=[f"{name}: {value}" for name, value in found.items()],
        extra=found,
    )
    return publish(report, machine)


def _search(dataset: Dataset, options: Any, found: dict[str, Any]) -> Figures:
    """Tune, killed once; its second half's result."""
    (dataset.scratch / "space.yaml").write_text(SPACE, encoding="utf-8")
    output = dataset.scratch / "best"
    command = [sys.executable, "jobs/tune.py", f"--data={dataset.folder}", f"--output={output}"]
    command += [f"--space={dataset.scratch / 'space.yaml'}", f"--trials={options.trials}"]
    command += [f"--epochs={options.epochs}", *FLAGS]
    started = time.monotonic()
    before = _kill_when_some_are_over(command, output)
    result = run_process(command, seconds=SECONDS).result
    seconds = time.monotonic() - started
    again = [name for name, written in before.items() if _written(output)[name] != written]
    if again:
        raise ContestantFailed(f"trials ran again: {again}")
    found |= {name: result[name] for name in ("best", "done", "stopped", "failed", "lost")}
    found["over when killed"] = len(before)
    return {
        "val_accuracy": result["val_accuracy"],
        "test_accuracy": accuracy_on_test(dataset, output),
        "seconds": seconds,
    }


def _as_given(dataset: Dataset, options: Any, found: dict[str, Any]) -> Figures:
    """The same training with the settings as given."""
    output = dataset.scratch / "default"
    command = [sys.executable, "jobs/train.py", f"--data={dataset.folder}", f"--output={output}"]
    finished = run_process([*command, f"--epochs={options.epochs}", *FLAGS], seconds=SECONDS)
    return {
        "val_accuracy": finished.result["val_accuracy"],
        "test_accuracy": accuracy_on_test(dataset, output),
        "seconds": finished.seconds,
    }


def _kill_when_some_are_over(command: Sequence[str], output: Path) -> dict[str, float]:
    """Start a search and kill its driver; the trials that were over, and when they were written."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + SECONDS
    while len(_written(output)) < OVER:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ContestantFailed("the search ended before it could be killed")
        time.sleep(0.2)
    time.sleep(5)  # into the next trial
    written = _written(output)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    note(f"killed with {len(written)} trials over")
    return written


def _written(output: Path) -> dict[str, float]:
    """When the record of each trial that is over was written."""
    return {path.parent.name: path.stat().st_mtime for path in output.glob("trials/*/trial.json")}


if __name__ == "__main__":
    run_benchmark(main)
