"""The soak's count of reads: it sees each one, and what a driver may not read again."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from colours import write_images
from read_counter import ReadCounter, ReadsAfterKills


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, range(8))
    return tmp_path


@pytest.fixture
def counter(folder: Path) -> Iterator[ReadCounter]:
    with closing(ReadCounter(folder)) as counter:
        yield counter


def test_reads_of_other_processes_are_counted(folder: Path, counter: ReadCounter) -> None:
    script = "import sys; [open(path).close() for path in sys.argv[1:]]"
    paths = [folder / "000000.png", folder / "000004.png", folder / "000004.png"]
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True, timeout=30)
    assert counter.take() == {"000000.png": 1, "000004.png": 2}
    assert counter.take() == {}


def test_keys_in_folders_are_counted_under_their_keys(folder: Path, counter: ReadCounter) -> None:
    path = next(path for path in folder.glob("1/*"))
    path.read_bytes()
    assert counter.take() == {f"1/{path.name}": 1}


def test_listing_is_not_reading(folder: Path, counter: ReadCounter) -> None:
    assert [path.stat() for path in folder.rglob("*")]
    assert counter.take() == {}


def test_what_was_in_flight_may_be_read_again() -> None:
    reads = ReadsAfterKills()
    assert not reads.add(Counter("abcd"), {"a", "b"})
    assert not reads.add(Counter("cdef"), set("abcdef"))
    assert (reads.in_flight, reads.most_in_flight, reads.again) == (2, 2, 2)


def test_published_images_may_not_be_read_again() -> None:
    reads = ReadsAfterKills()
    reads.add(Counter("abcd"), {"a", "b"})
    assert "1 images of published parts were read again" in reads.add(Counter("bcd"), set("abcd"))


def test_images_may_not_be_read_twice_in_a_run() -> None:
    assert ReadsAfterKills().add(Counter("aab"), {"a", "b"}) == [
        "1 images were read twice in a run"
    ]


def test_published_images_must_have_been_read() -> None:
    problems = ReadsAfterKills().add(Counter("a"), {"a", "b"})
    assert problems == ["1 published images were never read"]
