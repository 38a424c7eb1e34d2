"""Sections of a report that must end on time: figures by row, and what was not measured and why."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from benchmarks.harness import Contestant, Figures, SkipBenchmark, note
from benchmarks.report import Column

MIN_SECONDS = 1.0
"""A measurement that has less than this is not begun."""
AGAIN_SECONDS = 5.0
"""An alarm that some library has swallowed is raised again after this."""


class OutOfTime(BaseException):
    """A section's time is over. Not an ``Exception``: compilers catch those."""


class Clock:
    """Seconds that are left of a total, from when it was made."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline, none of them negative."""
        return max(0.0, self.deadline - time.monotonic())

    def part(self, fraction: float) -> Clock:
        """A clock for a part of what is left."""
        return Clock(self.left() * fraction)


@dataclass
class Section:
    """A table of the report: ``rows`` by contestant, ``missing`` says why others have none."""

    title: str
    columns: Sequence[Column]
    rows: dict[str, Figures] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def measure(self, contestants: Sequence[Contestant], clock: Clock) -> None:
        """Run contestants in turn until the time is over; one that fails does not stop others."""
        for contestant in contestants:
            name = contestant.name
            if (seconds := clock.left()) < MIN_SECONDS:
                self.missing[name] = "not begun: out of time"
                continue
            try:
                with _alarm(seconds):
                    self.rows[name] = contestant.run()
                note(f"{self.title}: {name}: done")
            except OutOfTime:
                self.missing[name] = f"stopped after {seconds:.0f} s: out of time"
            except SkipBenchmark as reason:
                self.missing[name] = str(reason)
            except Exception as error:  # compilers and drivers raise whatever they like
                self.failed[name] = f"{type(error).__name__}: {_first_line(error)}"
            _free_memory()

    def markdown(self) -> str:
        """The table with its remarks, and what is not in it."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [_row(["", *(column.title for column in self.columns)])]
            lines += [_row(["---", *("---:" for _ in self.columns)])]
            lines += [
                _row([name, *(_cell(figures, column) for column in self.columns)])
                for name, figures in self.rows.items()
            ]
            lines.append("")
        lines += [f"- {remark}" for remark in self.remarks]
        lines += [f"- not run: {name}: {reason}" for name, reason in self.missing.items()]
        lines += [f"- failed: {name}: {reason}" for name, reason in self.failed.items()]
        return "\n".join(lines).rstrip() + "\n"

    def document(self) -> Mapping[str, Any]:
        """The same for programs."""
        return {
            "title": self.title,
            "rows": {name: dict(figures) for name, figures in self.rows.items()},
            "missing": self.missing,
            "failed": self.failed,
            "remarks": self.remarks,
        }


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` in the main thread after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # somebody else's, such as a test's


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figures: Figures, column: Column) -> str:
    value = figures.get(column.figure)
    return "–" if value is None else f"{value:,.{column.digits}f}"
