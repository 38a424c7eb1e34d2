"""The images of a benchmark: photos of the user's, repeated to as many files as it takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import SkipBenchmark
from benchmarks.processes import ROOT

DATA = ROOT.parent / "shared" / "data"
"""Where development data lies beside the project, if it does."""


def find_photos(folder: str | None, *, name: str = "photos", flag: str = "--images") -> list[Path]:
    """The JPEG files below a folder, else below the development data's; sorted by path."""
    root = Path(folder) if folder is not None else DATA / name
    suffixes = (".jpg", ".jpeg")
    photos = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)
    if not photos:
        raise SkipBenchmark(f"no JPEG files in {root}: name a folder of them with {flag}")
    return [photo.resolve() for photo in photos]


def repeat_files(files: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """``count`` files in ``folder``: hard links to ``files`` in turn, copies where links fail."""
    folder.mkdir(parents=True)
    repeated = []
    for number in range(count):
        source = files[number % len(files)]
        target = folder / f"{number:07d}{source.suffix.lower()}"
        try:
            os.link(source, target)
        except OSError:  # another file system, or somebody else's file
            shutil.copyfile(source, target)
        repeated.append(target)
    return repeated


def write_table(urls: Sequence[str], file: Path) -> Path:
    """The input of every contestant: a Parquet file with the column url."""
    pq.write_table(pa.table({"url": pa.array(urls, pa.string())}), file)
    return file


def count_rows(folder: Path) -> int:
    """The rows of all Parquet files below a folder."""
    return sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet"))
