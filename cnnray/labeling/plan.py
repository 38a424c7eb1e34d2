"""What a labelling run has to do, frozen: every input once, cut into parts (output files).

A plan is a JSON document and the pieces that it lists: Parquet files of planned inputs, named by
their SHA-256 as the document is by its own. Whoever has the digest of a plan has all of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.datasets.sources.base import read_each
from cnnray.errors import ConflictError, StorageError
from cnnray.labeling.crash_points import crash_point
from cnnray.schema import PLAN_SCHEMA, PLAN_VERSION
from cnnray.storage import Store, encode_json, encode_parquet, sha256

PLAN_FOLDER = "_cnnray/plans"
DATA_FOLDER = "data"
"""The only folder that readers of labels look into."""

PIECE_ROWS = 262_144
"""Inputs of one piece, at most about: what a reader of the plan holds in memory."""


@dataclass(frozen=True)
class LabelPlan:
    """A plan that lies in ``store``."""

    store: Store
    digest: str
    rows: int
    part_rows: int
    duplicates: int  # inputs left out because their key was listed before
    pieces: Sequence[str]  # digests

    @property
    def num_parts(self) -> int:
        """Output files."""
        return -(-self.rows // self.part_rows)

    def part_name(self, part: int) -> str:
        """The file name of a part."""
        return f"part-{part:05d}-of-{self.num_parts:05d}.parquet"

    def rows_of(self, part: int) -> int:
        """How many inputs a part has."""
        return min(self.part_rows, self.rows - part * self.part_rows)

    def read_parts(self, parts: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        """Each part with its inputs (``PLAN_SCHEMA``); cheap when neighbours follow each other.

        Raises ``ConflictError`` when a piece is not what was planned.
        """
        parts_a_piece = _parts_a_piece(self.part_rows)
        loaded, table = -1, PLAN_SCHEMA.empty_table()
        for part in parts:
            piece, place = divmod(part, parts_a_piece)
            if piece != loaded:
                loaded, table = piece, self._read_piece(piece)
            yield part, table.slice(place * self.part_rows, self.part_rows)

    def _read_piece(self, number: int) -> pa.Table:
        key = _piece_key(self.pieces[number])
        data = self.store.read(key)
        if sha256(data) != self.pieces[number]:
            raise ConflictError(f"{self.store.uri}/{key} was changed: it is not what was planned")
        return pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)


def write_plan(
    store: Store, inputs: Iterable[pa.Table], *, part_rows: int, duplicates: int
) -> LabelPlan:
    """Write the plan to label ``inputs`` (tables with the columns of ``PLAN_SCHEMA``) in order.

    The same inputs make the same plan, so a second driver, or a second try, writes nothing new.
    """
    rows, pieces = 0, []
    for table in _rechunk(inputs, _parts_a_piece(part_rows) * part_rows):
        data = encode_parquet(table, compression="zstd")
        pieces.append(sha256(data))
        rows += table.num_rows
        store.create(_piece_key(pieces[-1]), data)
    document = {
        "version": PLAN_VERSION,
        "rows": rows,
        "part_rows": part_rows,
        "duplicates": duplicates,
        "pieces": pieces,
    }
    data = encode_json(document)
    crash_point("plan.after_pieces")
    store.create(_plan_key(sha256(data)), data)
    return _plan(store, sha256(data), document)


def read_plans(store: Store, digests: Sequence[str]) -> Iterator[LabelPlan]:
    """The plans with these digests. Raises ``ConflictError`` when one is not what was written."""
    keys = [_plan_key(digest) for digest in digests]
    for key, digest, data in zip(keys, digests, read_each(store.read, keys), strict=True):
        if isinstance(data, StorageError):
            raise data
        if sha256(data) != digest:
            raise ConflictError(f"{store.uri}/{key} was changed: it is not what was planned")
        document = json.loads(data)
        if document["version"] != PLAN_VERSION:
            raise ConflictError(
                f"{store.uri}/{key} has version {document['version']}, not {PLAN_VERSION}",
                hint="use the cnnray that wrote it",
            )
        yield _plan(store, digest, document)


def _plan(store: Store, digest: str, document: dict[str, Any]) -> LabelPlan:
    names = ("rows", "part_rows", "duplicates", "pieces")
    return LabelPlan(store=store, digest=digest, **{name: document[name] for name in names})


def _parts_a_piece(part_rows: int) -> int:
    return max(1, PIECE_ROWS // part_rows)


def _piece_key(digest: str) -> str:
    return f"{PLAN_FOLDER}/{digest}.parquet"


def _plan_key(digest: str) -> str:
    return f"{PLAN_FOLDER}/{digest}.json"


def _rechunk(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows, the last one smaller."""
    held = PLAN_SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.select(PLAN_SCHEMA.names)])
        while held.num_rows >= rows:
            yield held.slice(0, rows).combine_chunks()
            held = held.slice(rows)
    if held.num_rows:
        yield held.combine_chunks()
