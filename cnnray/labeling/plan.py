"""What a labelling run has to do: inputs cut into parts (output files) and chunks (tasks)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from cnnray.datasets.sources import copy_rows, is_first_of_key
from cnnray.storage import sha256


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive inputs of one part: what a worker labels at a time."""

    part: int
    number: int
    entries: pa.Table  # ENTRY_SCHEMA


@dataclass(frozen=True)
class LabelPlan:
    """Every input once, in the order of the listing."""

    entries: pa.Table  # ENTRY_SCHEMA
    part_rows: int
    chunk_rows: int
    duplicates: int  # inputs left out because their key was listed before

    @property
    def num_parts(self) -> int:
        """Output files."""
        return -(-int(self.entries.num_rows) // self.part_rows)

    @property
    def digest(self) -> str:
        """SHA-256 of what is to be labelled and how it is cut: the same for the same work."""
        names = zip(self.entries["key"].to_pylist(), self.entries["etag"].to_pylist(), strict=True)
        text = "".join(f"{key}\0{etag}\0" for key, etag in names)
        return sha256(f"{self.part_rows} {self.chunk_rows}\0{text}".encode())

    def part(self, number: int) -> pa.Table:
        """The inputs of a part."""
        return self.entries.slice(number * self.part_rows, self.part_rows)

    def part_name(self, number: int) -> str:
        """The file name of a part."""
        return f"part-{number:05d}-of-{self.num_parts:05d}.parquet"

    def chunks(self) -> Iterator[Chunk]:
        """All chunks, part by part."""
        for part in range(self.num_parts):
            entries = self.part(part)
            for number, start in enumerate(range(0, entries.num_rows, self.chunk_rows)):
                yield Chunk(part, number, copy_rows(entries, start, self.chunk_rows))


def plan_labels(entries: pa.Table, *, part_rows: int, chunk_rows: int) -> LabelPlan:
    """Plan to label each key once; of inputs with the same key the first one counts."""
    kept = entries.filter(is_first_of_key(entries))
    return LabelPlan(kept, part_rows, chunk_rows, entries.num_rows - kept.num_rows)
