"""Peaks of the private memory of a job's processes, sampled while it runs."""

from __future__ import annotations

import contextlib
import time

import psutil

SAMPLE_SECONDS = 0.5


class MemoryWatch:
    """Called with a job's process again and again; private memory (USS) leaves shared pages out.

    Workers are Ray's processes that have a task or an actor; ``tree`` is the driver and all that it
    started, the workers and Ray's servers.
    """

    def __init__(self) -> None:
        self.driver = self.worker = self.tree = 0
        self.sampled = float("-inf")

    def __call__(self, process: psutil.Process) -> None:
        now = time.monotonic()
        if now - self.sampled < SAMPLE_SECONDS:
            return
        self.sampled = now
        driver = process.memory_full_info().uss
        total = driver
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # processes come and go
                own = child.memory_full_info().uss
                total += own
                if is_worker(" ".join(child.cmdline())):
                    self.worker = max(self.worker, own)
        self.driver, self.tree = max(self.driver, driver), max(self.tree, total)

    def figures(self) -> dict[str, float]:
        """Peaks in megabytes."""
        peaks = {"driver": self.driver, "worker": self.worker, "tree": self.tree}
        return {f"{name}_mb": peak / 1e6 for name, peak in peaks.items()}


def is_worker(title: str) -> bool:
    """Whether a process of Ray's, by its title, is doing something for the job."""
    return title.startswith("ray::") and not title.startswith("ray::IDLE")
