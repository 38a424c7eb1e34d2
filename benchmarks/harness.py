"""The common part: contestants in turn, medians and spread, ratios. ``report`` shows them.

Machines differ and drift, so contestants alternate (A B C A B C) and a ratio is taken within each
round, where the machine was about the same for both.
"""

from __future__ import annotations

import contextlib
import datetime
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NoReturn

Figures = Mapping[str, float]
"""What one run of a contestant gave, by name; a figure that it does not have is left out."""


class SkipBenchmark(Exception):
    """What a benchmark needs is not here: said in one line, and no failure."""


class ContestantFailed(Exception):
    """A contestant's process failed, or did not do all of its work."""


@dataclass(frozen=True)
class Contestant:
    """A name, and what runs it once, in a fresh process."""

    name: str
    run: Callable[[], Figures]


@dataclass(frozen=True)
class Ratio:
    """One contestant's figure over another's; of several, the best (highest) of each round."""

    figure: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    goal: float | None = None

    @property
    def label(self) -> str:
        """As people read it."""
        over, under = (" | ".join(names) for names in (self.over, self.under))
        return f"{self.figure}: {over} / {under}"


@dataclass(frozen=True)
class Summary:
    """Median and spread of one value over the rounds."""

    median: float
    min: float
    max: float
    runs: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value."""
        runs = [float(f"{value:.5g}") for value in values]
        return cls(statistics.median(runs), min(runs), max(runs), runs)

    def show(self, digits: int) -> str:
        """``254 (251-260)``, or ``254`` of one run."""
        median, low, high = (f"{v:,.{digits}f}" for v in (self.median, self.min, self.max))
        return median if len(self.runs) == 1 else f"{median} ({low}-{high})"


@dataclass
class Results:
    """The figures of each contestant, one entry a round; None where it failed."""

    rounds: dict[str, list[Figures | None]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def summary(self, name: str, figure: str) -> Summary | None:
        """Of one figure of one contestant, or None if it never had it."""
        runs = self.rounds.get(name, ())
        values = [figures[figure] for figures in runs if figures and figure in figures]
        return Summary.of(values) if values else None

    def ratio(self, ratio: Ratio) -> Summary | None:
        """Of the rounds in which both sides have the figure."""
        over, under = self._best(ratio.figure, ratio.over), self._best(ratio.figure, ratio.under)
        values = [a / b for a, b in zip(over, under, strict=False) if a is not None and b]
        return Summary.of(values) if values else None

    def _best(self, figure: str, names: Sequence[str]) -> list[float | None]:
        rounds = zip_longest(*(self.rounds.get(name, ()) for name in names))
        found = ([run[figure] for run in runs if run and figure in run] for runs in rounds)
        return [max(values, default=None) for values in found]


def race(contestants: Sequence[Contestant], *, repeats: int) -> Results:
    """Run every contestant once a round; one that fails is left out of the rounds that follow."""
    results = Results({contestant.name: [] for contestant in contestants})
    for number in range(1, repeats + 1):
        for contestant in contestants:
            if contestant.name in results.failed:
                continue
            figures: Figures | None = None
            try:
                figures = contestant.run()
            except ContestantFailed as error:
                results.failed[contestant.name] = str(error)
            results.rounds[contestant.name].append(figures)
            note(f"round {number}/{repeats} {contestant.name}: {_in_short(figures)}")
    return results


def _in_short(figures: Figures | None) -> str:
    if figures is None:
        return "failed"
    return ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def note(text: str) -> None:
    """One line of progress, on stderr."""
    now = datetime.datetime.now()
    print(f"{now:%H:%M:%S} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stated_skips() -> Iterator[None]:
    try:
        yield
    except SkipBenchmark as reason:
        print(f"skipped: {reason}", flush=True)
        raise SystemExit(0) from None


def run_benchmark(main: Callable[[], int]) -> NoReturn:
    """A benchmark as a process: what it needs and does not find is one line and exit code 0."""
    with _stated_skips():
        raise SystemExit(main())
