"""Jobs as processes, and a Ray head like the one that a user starts."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
STOP_SECONDS = 20

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Head:
    """A running Ray head: where drivers join it, and where jobs are submitted."""

    address: str
    dashboard: str


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user who has activated the virtual environment."""
    scripts = sysconfig.get_path("scripts")
    return {
        "PATH": f"{scripts}:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/tmp"),
        "LANG": "C.UTF-8",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Run:
    """Run a command line to its end, in the project's folder unless ``cwd`` says otherwise."""

    def run_command(
        *command: str, cwd: Path = ROOT, seconds: float = 240, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment | variables,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"{command} took longer than {seconds} s:\n{stdout}\n{stderr}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run_command


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def head(environment: dict[str, str]) -> Iterator[Head]:
    """``ray start --head`` in a process group of its own, which ends with the tests."""
    port, dashboard, client, agent, grpc, runtime, metrics = _free_ports(7)
    folder = tempfile.mkdtemp(prefix="cr", dir="/tmp")  # Ray's socket paths must be short
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=300000000"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime}"]
    command += [f"--metrics-export-port={metrics}", "--disable-usage-stats"]
    found = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    log = Path(folder) / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
            start_new_session=True,
        )
    try:
        _wait_until_up(process, found, log, token=environment["RAY_AUTH_TOKEN"])
        yield found
    finally:
        _stop_group(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(process: subprocess.Popen[bytes], head: Head, log: Path, *, token: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray: {error}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """End Ray and every process that it started: all of them are in the group, or its children."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(STOP_SECONDS)


@pytest.fixture(scope="session")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 images of each of two classes that are easy to tell apart."""
    folder = tmp_path_factory.mktemp("shades")
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / name).mkdir()
        for number in range(60):
            pixels = (level + random.integers(-40, 41, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder
