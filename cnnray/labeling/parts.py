"""One output file: label rows of a part, checked against the plan, written once.

The part is its own marker: a file that is there is complete and final. Its footer says which run
and part it is, so that a driver whose create was refused can tell a part of the same run, whoever
wrote it, from a foreign file.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnnray.errors import AlreadyExistsError, CnnrayError, ConflictError
from cnnray.labeling.crash_points import crash_point
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import Store, decode_json, encode_parquet, sha256

FOOTER_KEY = b"cnnray"

CHECKED_SCHEMA = pa.schema([LABELS_SCHEMA.field(name) for name in ("key", "etag", "status")])
"""What is read of a part to check it."""

NO_PART = "is not a part of a table of labels, or damaged"


@dataclass(frozen=True, slots=True)
class PartFooter:
    """What the footer of a part says of it. A sealed part has no rows."""

    run: str
    part: int
    rows: int
    ok: int


@dataclass(frozen=True, slots=True)
class PublishedPart:
    """A part that is there: its footer, and the SHA-256 of its bytes."""

    footer: PartFooter
    digest: str


def write_part(
    store: Store, key: str, rows: pa.Table, *, run: str, part: int
) -> PublishedPart | None:
    """Write a part by one conditional create.

    None when the part was there already, whoever wrote it: of two drivers that label the same part
    the first one counts. Raises ``ConflictError`` when something else has its name.
    """
    footer = PartFooter(run=run, part=part, rows=rows.num_rows, ok=_count_ok(rows))
    data = encode_part(rows, footer)
    crash_point("part.before_create")
    try:
        store.create(key, data)
    except AlreadyExistsError:
        try:
            decode_part(store.read(key), run=run, part=part)
        except ValueError as error:
            raise ConflictError(f"{store.uri}/{key} {error}") from None
        return None
    crash_point("part.after_create")
    return PublishedPart(footer, sha256(data))


def decode_part(data: bytes, *, run: str, part: int) -> tuple[PartFooter, pa.Table]:
    """The footer of a part, and its rows as far as they are checked (``CHECKED_SCHEMA``).

    Raises ``ValueError``, whose text says what else the bytes are.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        footer = PartFooter(**decode_json((file.metadata.metadata or {})[FOOTER_KEY]))
        rows = file.read(CHECKED_SCHEMA.names, use_threads=False)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(NO_PART) from error
    if not rows.schema.equals(CHECKED_SCHEMA):
        raise ValueError(NO_PART)
    wanted = PartFooter(run=run, part=part, rows=rows.num_rows, ok=_count_ok(rows))
    if (footer.rows, footer.ok) != (wanted.rows, wanted.ok):
        raise ValueError(NO_PART)
    if footer != wanted:
        raise ValueError(f"is part {footer.part} of run {footer.run}")
    return wanted, rows


def _count_ok(rows: pa.Table) -> int:
    return int(pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0)


def encode_part(rows: pa.Table, footer: PartFooter) -> bytes:
    """The bytes of a part, read back and compared before anybody sees them."""
    metadata = {FOOTER_KEY: json.dumps(asdict(footer)).encode()}
    data = encode_parquet(rows.replace_schema_metadata(metadata), compression="zstd")
    written = pq.ParquetFile(io.BytesIO(data)).read(columns=["key", "etag"])
    if not written.equals(rows.select(["key", "etag"])):
        raise CnnrayError(f"part {footer.part} of run {footer.run} does not read back as written")
    return data
