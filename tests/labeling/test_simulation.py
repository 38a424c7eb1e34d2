"""The protocol under every fault at once, many times over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SEEDS, PROCESSES = 2000, 2
DEADLINE_SECONDS = 600


def run(first: int, count: int, *flags: str) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("simulation.py")
    command = [sys.executable, str(program), str(first), str(count), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def violations_of(process: subprocess.Popen[str]) -> dict[str, list[str]]:
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    return dict(json.loads(output))


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_SECONDS + 60)
def test_no_seed_of_three_drivers_in_a_world_of_faults_violates_anything():
    share = SEEDS // PROCESSES
    processes = [run(number * share, share) for number in range(PROCESSES)]
    assert [violations_of(process) for process in processes] == [{}] * PROCESSES


def test_the_same_worlds_show_the_violations_of_a_store_that_overwrites():
    found = violations_of(run(0, 20, "--overwrites"))
    kinds = {kind for violations in found.values() for kind in violations}
    assert len(found) >= 5
    assert "a visible value has changed" in kinds
