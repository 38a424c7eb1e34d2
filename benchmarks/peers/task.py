"""What every labelling peer is told, and how it says when a batch is done."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_SIZE = 100
"""Images of one forward pass, as in the scripts of Ray and Daft."""


@dataclass(frozen=True)
class Task:
    """Label the images of ``table`` (column url) into Parquet files below ``output``."""

    table: str
    output: str
    network: str
    weights: str
    marks: str
    device: str

    @classmethod
    def parse(cls, parser: argparse.ArgumentParser) -> tuple[Task, argparse.Namespace]:
        """The task from argv, and what else ``parser`` was told to take."""
        for name in ("table", "output", "network", "weights", "marks"):
            parser.add_argument(f"--{name}", required=True)
        parser.add_argument("--device", default="cpu")
        options = parser.parse_args()
        names = ("table", "output", "network", "weights", "marks", "device")
        return cls(**{name: getattr(options, name) for name in names}), options

    def urls(self) -> list[str]:
        """The images of the table."""
        urls: list[str] = pq.read_table(self.table)["url"].to_pylist()
        return urls

    def write(self, urls: list[str], labels: list[str]) -> None:
        """One Parquet file with all labels."""
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"url": urls, "label": labels}), folder / "labels.parquet")


def mark(path: str, images: int) -> None:
    """Note that a batch of so many images is done; the clock is the machine's, in any process."""
    with Path(path).open("a", encoding="ascii") as file:
        file.write(f"{time.monotonic()} {images}\n")
