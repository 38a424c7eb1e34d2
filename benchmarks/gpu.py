"""How busy the GPU is while a contestant runs, as nvidia-smi tells it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.harness import Contestant, Figures

SAMPLE_MILLISECONDS = 200
QUERY = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]


def watch_gpu(contestant: Contestant) -> Contestant:
    """The same contestant, with ``gpu_busy_fraction`` where there is an nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return contestant

    def run() -> Figures:
        with _samples() as samples:
            figures = contestant.run()
        busy = busy_fraction(samples, first_batch_seconds=figures.get("first_batch_seconds", 0.0))
        return figures if busy is None else {**figures, "gpu_busy_fraction": busy}

    return replace(contestant, run=run)


def busy_fraction(samples: Sequence[str], *, first_batch_seconds: float) -> float | None:
    """Mean utilisation after the first batch; ``samples`` are nvidia-smi's lines, in percent."""
    first = int(first_batch_seconds * 1000 / SAMPLE_MILLISECONDS)
    values = [float(line) for line in samples[first:] if line.strip().isdecimal()]
    return sum(values) / len(values) / 100 if values else None


@contextlib.contextmanager
def _samples() -> Iterator[list[str]]:
    """Lines of nvidia-smi that are there once the block has ended."""
    command = ["nvidia-smi", *QUERY, f"-lms={SAMPLE_MILLISECONDS}"]
    lines: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield lines
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
        lines += output.splitlines()
