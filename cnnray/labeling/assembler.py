"""Label rows in any order, into whole parts in the order of the plan."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import CnnrayError

HELD_ROWS = 1_000_000
"""Rows of unfinished parts kept in memory, at most about; beyond that they go to local disk."""


@dataclass
class _Part:
    """Rows of an unfinished part so far."""

    planned: pa.Table  # key, etag
    has: np.ndarray[Any, np.dtype[np.bool_]]
    tables: list[pa.Table] = field(default_factory=list)
    spilled: list[str] = field(default_factory=list)

    @property
    def held_rows(self) -> int:
        return sum(table.num_rows for table in self.tables)


class PartAssembler:
    """Collects rows by (part, row); a part is ready when each of its rows is there.

    A row that comes twice (a retried task) counts once, whatever block it comes in. Memory is
    bounded by spilling, never by refusing rows: the rows that a part lacks may be behind them.
    """

    def __init__(self, *, held_rows: int = HELD_ROWS) -> None:
        self.held_rows = held_rows
        self.taken = 0  # rows, each once
        self.parts: dict[int, _Part] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def expect(self, part: int, planned: pa.Table) -> None:
        """Take note of the inputs of a part, before its first rows come."""
        self.parts[part] = _Part(planned.select(["key", "etag"]), np.zeros(planned.num_rows, bool))

    def add(self, rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        """Take label rows with the columns ``part`` and ``row``; the parts that they complete.

        Rows of a part that is complete, or was never expected, are dropped.
        """
        for number in pc.unique(rows["part"]).to_pylist():
            part = self.parts.get(number)
            if part is None:
                continue
            self.taken += _take(
                part, rows.filter(pc.equal(rows["part"], number)).drop_columns(["part"])
            )
            if part.has.all():
                del self.parts[number]
                yield number, _whole(number, part)
        self._spill()

    def close(self) -> None:
        """Remove what was spilled."""
        self.parts.clear()
        if self.folder is not None:
            self.folder.cleanup()

    def _spill(self) -> None:
        """Move whole parts to disk, those with the most rows first, until few rows are held."""
        while sum(part.held_rows for part in self.parts.values()) > self.held_rows:
            number, part = max(self.parts.items(), key=lambda item: item[1].held_rows)
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="cnnray-")
            path = os.path.join(self.folder.name, f"{number}-{len(part.spilled)}.arrow")
            table = pa.concat_tables(part.tables)
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
            part.spilled.append(path)
            part.tables.clear()


def _take(part: _Part, rows: pa.Table) -> int:
    """Keep the rows that the part lacks; their number."""
    numbers = rows["row"].to_numpy()
    is_new = ~part.has[numbers]
    _, first = np.unique(numbers, return_index=True)
    is_first = np.zeros(len(numbers), bool)
    is_first[first] = True
    is_new &= is_first
    part.has[numbers] = True
    part.tables.append(rows if is_new.all() else rows.filter(pa.array(is_new)))
    return int(is_new.sum())


def _whole(number: int, part: _Part) -> pa.Table:
    """All rows of a part, in the order of the plan, which they are compared with."""
    tables = [pa.ipc.open_file(path).read_all() for path in part.spilled] + part.tables
    for path in part.spilled:
        os.unlink(path)
    rows = pa.concat_tables(tables)
    rows = rows.take(pc.sort_indices(rows["row"])).drop_columns(["row"]).combine_chunks()
    for name in ("key", "etag"):
        if not rows[name].combine_chunks().equals(part.planned[name].combine_chunks()):
            raise CnnrayError(f"part {number} does not hold the images that were planned")
    return rows
