"""What a GPU gives cnnray, in eight minutes and without Ray: labels, speed, training, memory.

Sections: each engine's labels against strict float32, and the speed of its network alone; the
quickest engine fed by decoding processes; the training step in each precision. Needs torch, numpy,
pyarrow, Pillow, pydantic and safetensors; runs from a checkout, with nothing installed of cnnray
itself. What there is no time for is named. ``--device cpu --short`` tries it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import SkipBenchmark, note, run_benchmark
from benchmarks.report import describe_machine, installed_versions

if TYPE_CHECKING:
    from benchmarks.readiness.sections import Section

PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
}
"""What must be there, by the names of the module and of the package."""

GRACE_SECONDS = 15.0
"""After the last section's time; then the process is ended, whatever it is stuck in."""
COMPILING = "compiling takes a minute or two on a CPU: leave out --short"


@dataclass(frozen=True)
class Form:
    """How much is measured: ``seconds`` for each speed, ``teach_steps`` before labels are compared.

    ``photos`` are what labels are compared on, ``files`` what is decoded again and again.
    """

    minutes: float
    network: str
    size: int
    batch_size: int
    photos: int
    files: int
    teach_steps: int
    seconds: float


FULL = Form(8.0, "resnet50", 224, 256, photos=2048, files=128, teach_steps=100, seconds=3.0)
SHORT = Form(0.6, "small_cnn", 16, 16, photos=128, files=16, teach_steps=40, seconds=0.3)


@dataclass
class Readiness:
    """The whole report; it can be shown at any time."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    sections: list[Section] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """For people."""
        facts = (self.settings, self.machine, self.versions)
        lines = ["# GPU readiness", ""]
        lines += ["- " + ", ".join(f"{name} {value}" for name, value in f.items()) for f in facts]
        lines += [f"- {remark}" for remark in self.remarks]
        return "\n".join([*lines, "", *(section.markdown() for section in self.sections)])

    def write(self, output: str | None) -> None:
        """For programs: as JSON, if a file is named."""
        if output is None:
            return
        document = {
            "benchmark": "gpu_readiness",
            "settings": dict(self.settings),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "sections": [section.document() for section in self.sections],
            "remarks": self.remarks,
        }
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code: 1 when something failed."""
    options = _parser().parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipBenchmark(f"needs {', '.join(PACKAGES[name] for name in missing)}: pip install")
    import torch

    from cnnray.errors import CnnrayError

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SkipBenchmark("no GPU on this machine: try it with --device cpu --short")
    form = SHORT if options.short else FULL
    if options.device == "cpu":
        torch.set_num_threads(1)  # decoding processes and others take the cores, too
    report = Readiness(_settings(options, form), describe_machine(), installed_versions())
    minutes = options.minutes or form.minutes
    watchdog = threading.Timer(60 * minutes + GRACE_SECONDS, _give_up, [report, options.output])
    watchdog.daemon = True
    watchdog.start()
    try:
        with tempfile.TemporaryDirectory(prefix="cnnray-bench-") as scratch:
            _measure(report, options, form, seconds=60 * minutes, scratch=Path(scratch))
    except CnnrayError as error:  # a network that does not exist, say
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        watchdog.cancel()
    print(report.markdown(), flush=True)
    report.write(options.output)
    return 1 if any(section.failed for section in report.sections) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="once, with little: a smoke test")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=_minutes, help="in all (8; --short: 0.6)")
    parser.add_argument("--network", help="resnet50, resnet18, … (--short: small_cnn)")
    parser.add_argument("--photos", metavar="FOLDER", help="JPEGs to decode (made-up ones)")
    parser.add_argument("--processes", type=_processes, help="that decode (one a core)")
    parser.add_argument("--output", metavar="FILE", help="where the figures go as JSON")
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= 60:
        raise argparse.ArgumentTypeError("must be more than 0, and 60 at the most")
    return minutes


def _processes(text: str) -> int:
    processes = int(text)
    if not 1 <= processes <= 256:
        raise argparse.ArgumentTypeError("must be 1 to 256")
    return processes


def _settings(options: argparse.Namespace, form: Form) -> dict[str, Any]:
    return {
        "device": options.device,
        "network": options.network or form.network,
        "size": form.size,
        "batch_size": form.batch_size,
        "photos": options.photos or f"{form.files} made up",
        "processes": options.processes or len(os.sched_getaffinity(0)),
        "minutes": options.minutes or form.minutes,
    }


def _measure(
    report: Readiness, options: argparse.Namespace, form: Form, *, seconds: float, scratch: Path
) -> None:
    """The sections in turn; each may use a part of the time that is left when it begins."""
    import torch

    from benchmarks.readiness import JPEG_DECODER, engines, feed, training
    from benchmarks.readiness.sections import Clock, Section
    from benchmarks.readiness.subject import prepare_subject

    clock = Clock(seconds)
    files = _find_photos(options.photos) or feed.write_photos(scratch, form.files)
    subject = prepare_subject(
        report.settings["network"],
        device=torch.device(options.device),
        size=form.size,
        photos=form.photos,
        batch_size=form.batch_size,
        steps=form.teach_steps,
        seconds=form.seconds,
    )
    report.remarks += [f"JPEG decoder: {JPEG_DECODER}", *subject.remarks]
    quickest = engines.Quickest()
    plan = (
        ("Labels and speed", engines.COLUMNS, 0.45),
        ("Fed by decoding processes", feed.COLUMNS, 0.6),
        ("Training step", training.COLUMNS, 1.0),
    )
    labels, fed, steps = sections = [Section(title, columns) for title, columns, _ in plan]
    contestants = (
        engines.engine_contestants(subject, quickest),
        feed.feed_contestants(subject, quickest, files, report.settings["processes"]),
        training.training_contestants(subject),
    )
    report.sections += sections
    for section, entered, (_, _, part) in zip(sections, contestants, plan, strict=True):
        chosen = [one for one in entered if not (options.short and "compiled" in one.name)]
        skipped = {one.name: COMPILING for one in entered if one not in chosen}
        section.measure(chosen, clock.part(part))
        section.missing.update(skipped)
        report.write(options.output)
    labels.remarks.append("network alone: on a batch that is on the device already")
    fed.remarks.append(f"the network is that of: {quickest.name or 'none'}")
    if options.device == "cpu":
        resident = "peak memory: on the CPU, what was resident of the process at most so far"
        labels.remarks.append(resident)
        steps.remarks.append(resident)


def _find_photos(folder: str | None) -> list[Path]:
    """The JPEG files below a folder; none if none is named."""
    if folder is None:
        return []
    suffixes = (".jpg", ".jpeg")
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
    if not found:
        raise SkipBenchmark(f"no JPEG files in {folder}: name a folder of them with --photos")
    return found


def _give_up(report: Readiness, output: str | None) -> None:
    """Show what there is and end the process: something does not return, not even to an alarm."""
    note("out of time: what runs now does not end, and this process does")
    print(report.markdown(), flush=True)
    report.write(output)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    run_benchmark(main)
