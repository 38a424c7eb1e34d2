"""One run of a contestant: a fresh process, timed from its start to its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.harness import ContestantFailed

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.05
PROGRESS = re.compile(r": ([\d,]+) / [\d,]+ images,")
"""A progress line of cnnray's: how many are done."""

MIN_MARKS = 5
"""Batches of a run below which there is no steady state to speak of."""

Mark = tuple[float, int]
"""Seconds since the start, and images done by then."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    seconds: float
    marks: list[Mark]
    result: dict[str, Any]  # the last line of stdout, if it is a JSON object


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This environment without the Ray that may be named in it, and a token for a local one."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    return environment | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # otherwise Ray writes one to the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
        **extra,
    }


def run_process(
    command: Sequence[str],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    marks: Path | None = None,
    watch: Callable[[psutil.Process], None] | None = None,
) -> Finished:
    """Run a command to its end; ``watch`` is called with the process again and again meanwhile.

    Marks are read from the file that a peer wrote, else from cnnray's progress lines. Raises
    ``ContestantFailed`` when it fails, or takes longer than ``seconds``; it is killed then.
    """
    with tempfile.TemporaryFile() as stdout:
        started = time.monotonic()
        process = psutil.Popen(
            command,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=clean_environment(environment or {}),
            start_new_session=True,
        )
        lines: list[tuple[float, str]] = []
        reader = threading.Thread(target=_read_lines, args=(process.stderr, lines), daemon=True)
        reader.start()
        try:
            _wait(process, deadline=started + seconds, watch=watch)
        finally:
            _kill(process)
        ended = time.monotonic()
        reader.join(5)
        stdout.seek(0)
        output = stdout.read().decode(errors="replace")
    if process.returncode != 0:
        tail = "\n".join(line for _, line in lines[-15:])
        print(tail, file=sys.stderr)
        last = lines[-1][1] if lines else "no message"
        raise ContestantFailed(f"exit code {process.returncode}: {last}")
    found = _written_marks(marks) if marks is not None else _logged_marks(lines)
    return Finished(
        seconds=ended - started,
        marks=[(when - started, done) for when, done in found],
        result=_last_object(output),
    )


def _wait(
    process: psutil.Popen, *, deadline: float, watch: Callable[[psutil.Process], None] | None
) -> None:
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise ContestantFailed("still running at its deadline: killed")
        if watch is not None:
            with contextlib.suppress(psutil.Error):  # processes come and go
                watch(process)
        time.sleep(POLL_SECONDS)


def _kill(process: psutil.Popen) -> None:
    """End a process that is still there, and what it started: Ray's servers have other groups."""
    if process.poll() is not None:
        return
    children = process.children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait(30)


def _read_lines(pipe: IO[bytes], lines: list[tuple[float, str]]) -> None:
    for line in pipe:
        lines.append((time.monotonic(), line.decode(errors="replace").rstrip()))


def _written_marks(path: Path) -> list[Mark]:
    """Batches of any process, in the order of time, added up."""
    if not path.exists():
        return []
    batches = sorted(
        (float(when), int(images)) for when, images in map(str.split, path.read_text().splitlines())
    )
    done, marks = 0, []
    for when, images in batches:
        done += images
        marks.append((when, done))
    return marks


def _logged_marks(lines: Sequence[tuple[float, str]]) -> list[Mark]:
    found = ((when, PROGRESS.search(line)) for when, line in lines)
    return [(when, int(match[1].replace(",", ""))) for when, match in found if match]


def _last_object(output: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        value = json.loads(lines[-1])
        if isinstance(value, dict):
            return value
    return {}


def steady_rate(marks: Sequence[Mark]) -> float | None:
    """Images a second after the first labelled batch; None of fewer than ``MIN_MARKS`` batches.

    The slope of the line through (time, images done) by least squares: the difference of the first
    and the last mark would also count what other workers had under way at the first one.
    """
    if len(marks) < MIN_MARKS or marks[-1][0] <= marks[0][0]:
        return None
    times, done = zip(*marks, strict=True)
    return statistics.linear_regression(times, done).slope
