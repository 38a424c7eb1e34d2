"""Jobs as processes, and a Ray head like the one that a user starts."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray_jobs import START_SECONDS, free_ports, ray_head, wait_until

ROOT = Path(__file__).parents[2]

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


@pytest.fixture(scope="session")
def head(environment: dict[str, str]) -> Iterator[Head]:
    """A Ray head with a dashboard, which takes jobs."""
    [dashboard] = free_ports(1)
    with ray_head(environment, dashboard_port=dashboard) as node:
        found = Head(node.address, f"http://127.0.0.1:{dashboard}")
        wait_until(
            lambda: _takes_jobs(found, token=environment["RAY_AUTH_TOKEN"]),
            f"jobs taken at {found.dashboard}",
            seconds=START_SECONDS,
        )
        yield found


def _takes_jobs(head: Head, *, token: str) -> bool:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


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
