"""What a labelling run has to do, frozen: every input once, cut into parts (output files).

A plan is a JSON document and the pieces that it lists: Parquet files of planned inputs, named by
their SHA-256 as the document is by its own. Whoever has the digest of a plan has all of it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.errors import ConflictError
from cnnray.labeling.crash_points import crash_point
from cnnray.schema import PLAN_SCHEMA, PLAN_VERSION
from cnnray.storage import Store, decode_json, encode_json, encode_parquet, sha256

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
    piece_parts: int  # parts of one piece
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
        reader = PlanReader(self)
        for part in parts:
            yield part, reader.read(part)


class PlanReader:
    """Reads the inputs of parts; cheap when neighbours follow each other."""

    def __init__(self, plan: LabelPlan) -> None:
        self.plan = plan
        self.piece = -1  # that is held
        self.inputs = PLAN_SCHEMA.empty_table()

    def read(self, part: int) -> pa.Table:
        """The inputs of a part (``PLAN_SCHEMA``), in order.

        Raises ``ConflictError`` when its piece is not what was planned.
        """
        piece, place = divmod(part, self.plan.piece_parts)
        if piece != self.piece:
            self.inputs = _read_piece(self.plan.store, self.plan.pieces[piece])
            self.piece = piece
        return self.inputs.slice(place * self.plan.part_rows, self.plan.part_rows)


def _read_piece(store: Store, digest: str) -> pa.Table:
    key = _piece_key(digest)
    data = store.read(key)
    if sha256(data) != digest:
        raise ConflictError(f"{store.uri}/{key} was changed: it is not what was planned")
    return pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)


def write_plan(
    store: Store, inputs: Iterable[pa.Table], *, part_rows: int, duplicates: int
) -> LabelPlan:
    """Write the plan to label ``inputs`` (tables with the columns of ``PLAN_SCHEMA``) in order.

    The same inputs make the same plan, so a second driver, or a second try, writes nothing new.
    """
    piece_parts = max(1, PIECE_ROWS // part_rows)
    rows, pieces = 0, []
    for table in _rechunk(inputs, piece_parts * part_rows):
        data = encode_parquet(table, compression="zstd")
        pieces.append(sha256(data))
        rows += table.num_rows
        store.create(_piece_key(pieces[-1]), data)
    document = {
        "version": PLAN_VERSION,
        "rows": rows,
        "part_rows": part_rows,
        "piece_parts": piece_parts,
        "duplicates": duplicates,
        "pieces": pieces,
    }
    data = encode_json(document)
    crash_point("plan.after_pieces")
    store.create(_plan_key(sha256(data)), data)
    return _parse_plan(store, sha256(data), data)


def read_plan(store: Store, digest: str) -> LabelPlan:
    """The plan with this digest. Raises ``ConflictError`` when it is not what was written."""
    key = _plan_key(digest)
    data = store.read(key)
    if sha256(data) != digest:
        raise ConflictError(f"{store.uri}/{key} was changed: it is not what was planned")
    return _parse_plan(store, digest, data)


def _parse_plan(store: Store, digest: str, data: bytes) -> LabelPlan:
    where = f"{store.uri}/{_plan_key(digest)}"
    try:
        document = decode_json(data)
    except ValueError:
        document = None
    match document:
        case {"version": version} if version != PLAN_VERSION:
            raise ConflictError(
                f"{where} has version {version}, not {PLAN_VERSION}",
                hint="use the cnnray that wrote it",
            )
        case {
            "version": _,
            "rows": int(rows),
            "part_rows": int(part_rows),
            "piece_parts": int(piece_parts),
            "duplicates": int(duplicates),
            "pieces": list(pieces),
        }:
            return LabelPlan(store, digest, rows, part_rows, piece_parts, duplicates, pieces)
    raise ConflictError(f"{where} is not a plan")


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
