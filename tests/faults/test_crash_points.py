"""A driver killed at each side of each step: the next one finishes, and each image has one row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checker import find_problems
from colours import write_images

from cnnray.labeling.crash_points import CRASH_POINTS

HERE = Path(__file__).parent
NUM_IMAGES, PART_ROWS = 40, 8  # five parts
DEADLINE_SECONDS = 60

# How often an undisturbed driver passes each point: the first, the second and the last are tried.
PASSES = dict.fromkeys(CRASH_POINTS, 1) | dict.fromkeys(
    ("part.before_create", "part.after_create"), 5
)
CRASHES = [
    (point, time) for point, last in PASSES.items() for time in sorted({1, 2, last}) if time <= last
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images to label."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def images(folder: Path) -> dict[str, str]:
    """Their keys and colours."""
    return write_images(folder, range(NUM_IMAGES))


def drive(folder: Path, table: Path, *, crash_at: str = "") -> subprocess.CompletedProcess[str]:
    """Run a driver to its end, or to the point where it is killed."""
    command = [sys.executable, str(HERE / "toy_driver.py"), str(folder), str(table)]
    return subprocess.run(
        [*command, f"--part_rows={PART_ROWS}"],
        env=os.environ | {"CNNRAY_CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def files_of(table: Path) -> dict[str, tuple[int, int]]:
    """Every published part: its inode and time of change."""
    parts = (path for path in (table / "data").rglob("*") if path.is_file())
    return {
        str(path): (status.st_ino, status.st_mtime_ns) for path in parts for status in [path.stat()]
    }


@pytest.mark.parametrize(("point", "time"), CRASHES)
def test_a_driver_killed_at_any_point_is_followed_by_one_that_finishes_its_work(
    point, time, folder, images, tmp_path
):
    table = tmp_path / "labels"
    killed = drive(folder, table, crash_at=f"{point}:{time}")
    assert killed.returncode == -signal.SIGKILL, f"{point} was never reached: {killed.stderr}"
    published = files_of(table)
    if published:
        problems = find_problems(table, images)
        assert [line for line in problems if "without a row" not in line] == []

    finished = drive(folder, table)
    assert finished.returncode == 0, finished.stderr
    assert find_problems(table, images) == []
    assert published.items() <= files_of(table).items()  # no part was written again
    assert int(finished.stdout) == NUM_IMAGES - PART_ROWS * len(published)  # nor read again

    idle = drive(folder, table)
    assert (idle.returncode, idle.stdout) == (0, "0\n")
    leftovers = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert leftovers == []


def test_every_crash_point_is_tried():
    assert {point for point, _ in CRASHES} == set(CRASH_POINTS)
