"""The classify job as a process that a test may stop or kill, and a Ray head that outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
POISON = ROOT / "tests/images/poison"
"""With this folder on PYTHONPATH, images may harm their decoder, or take their time."""

START_SECONDS = 120
STOP_SECONDS = 20
JOB_SECONDS = 180
POLL_SECONDS = 0.01


def environment(**variables: str) -> dict[str, str]:
    """A user's environment with the virtual environment and the code beside these tests."""
    return {
        "PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/tmp"),
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"{POISON}:{ROOT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        **variables,
    }


def wait_until(condition: Callable[[], object], what: str, *, seconds: float = JOB_SECONDS) -> None:
    """Poll until something is the case. Raises ``TimeoutError`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(POLL_SECONDS)


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Kill those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, STOP_SECONDS)


def label_workers(ancestor: int) -> list[psutil.Process]:
    """The processes of ``LabelActor`` among the descendants of a process."""
    found = []
    for process in psutil.Process(ancestor).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            title = process.cmdline()[0]
            if title.startswith("ray::") and "LabelActor" in title:
                found.append(process)
    return found


# Jobs


class Job:
    """``jobs/classify.py`` in a session of its own; its log and its result go to files."""

    def __init__(self, folder: Path, *flags: str, variables: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="job-", dir=folder))
        command = [sys.executable, "jobs/classify.py", *flags]
        with (self.folder / "out").open("wb") as out, (self.folder / "log").open("wb") as log:
            self.started = time.monotonic()
            self.ended = 0.0
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=out, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all that it started, whatever state they are in."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            end_processes(children)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        """Since its start, or from its start until it was seen to have ended."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def result(self) -> dict[str, Any]:
        """The last line of its standard output."""
        return dict(json.loads((self.folder / "out").read_text().splitlines()[-1]))

    @property
    def error_lines(self) -> list[str]:
        """What it says when it fails: all of its log from the error on."""
        lines = self.log.splitlines()
        first = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        return lines[first[0] :] if first else lines

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = JOB_SECONDS) -> int:
        """Its exit code. Raises ``TimeoutError`` with its log when it takes longer."""
        if not self.wait_at_most(seconds):
            raise TimeoutError(f"no end after {seconds:.0f} s:\n{self.log}")
        return self.process.returncode

    def wait_at_most(self, seconds: float) -> bool:
        """Whether it has ended within this time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self.ended = self.ended or time.monotonic()
        return True

    def kill_after(self, seconds: float) -> bool:
        """Kill it so many seconds after its start; False when it has ended before."""
        if self.wait_at_most(max(0.0, seconds - self.seconds)):
            return False
        self.process.kill()
        self.wait()
        return True

    def wait_for_parts(self, table: Path, count: int) -> None:
        """Until so many parts are in a table on disk. ``AssertionError`` when it ends before."""

        def is_there() -> bool:
            is_running = self.is_running
            enough = len(parts_of(table)) >= count
            assert enough or is_running, f"ended too soon:\n{self.log}"
            return enough

        wait_until(is_there, f"{count} parts in {table}")


def parts_of(table: Path) -> dict[str, tuple[int, int]]:
    """Every published part of a table on disk: its inode and the time of its last change."""
    parts = {}
    for path in (table / "data").rglob("*"):
        status = path.stat()
        if path.is_file():
            parts[str(path)] = (status.st_ino, status.st_mtime_ns)
    return parts


def verify(table: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``jobs/verify.py``, run to its end."""
    command = [sys.executable, "jobs/verify.py", "--output", table]
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=JOB_SECONDS
    )


# Ray


@dataclass(frozen=True)
class RayNode:
    """A running node: the address of its cluster, and the process that holds all of its own."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """End it and all that it started, at once, as a machine that loses its power."""
        if self.process.poll() is None:
            family = psutil.Process(self.pid).children(recursive=True)
            self.process.kill()
            end_processes(family)
            self.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def ray_head(
    variables: dict[str, str], *, num_cpus: int = 2, dashboard_port: int | None = None
) -> Iterator[RayNode]:
    """``ray start --head`` with ports and a folder of its own."""
    port, client, agent, grpc, runtime, metrics = free_ports(6)
    folder = tempfile.mkdtemp(prefix="cr", dir="/tmp")  # Ray's socket paths must be short
    flags = ["--head", f"--port={port}", f"--temp-dir={folder}"]
    if dashboard_port is None:
        flags += ["--include-dashboard=false"]
    else:
        flags += ["--include-dashboard=true", f"--dashboard-port={dashboard_port}"]
    flags += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    flags += [f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime}"]
    flags += [f"--metrics-export-port={metrics}"]
    try:
        with _ray_start(f"127.0.0.1:{port}", flags, variables, num_cpus=num_cpus) as head:
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: RayNode, variables: dict[str, str], *, num_cpus: int) -> Iterator[RayNode]:
    """One more node for a cluster."""
    flags = [f"--address={head.address}"]
    with _ray_start(head.address, flags, variables, num_cpus=num_cpus) as node:
        yield node


@contextlib.contextmanager
def _ray_start(
    address: str, flags: Sequence[str], variables: dict[str, str], *, num_cpus: int
) -> Iterator[RayNode]:
    command = ["ray", "start", "--block", *flags, f"--num-cpus={num_cpus}"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=300000000"]
    variables = variables | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--disable-usage-stats"],
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,
        )
        node = RayNode(address, process)

        def is_up() -> bool:
            text = Path(log.name).read_text(errors="replace")
            assert process.poll() is None, f"Ray did not start:\n{text[-3000:]}"
            return "Ray runtime started" in text

        try:
            wait_until(is_up, "Ray runtime started", seconds=START_SECONDS)
            yield node
        finally:
            node.kill()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
