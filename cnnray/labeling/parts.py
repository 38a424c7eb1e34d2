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
from cnnray.storage import Store, encode_parquet, sha256

FOOTER_KEY = b"cnnray"


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


def publish_part(
    store: Store, key: str, rows: pa.Table, *, run: str, part: int
) -> PublishedPart | None:
    """Write a part by one conditional create.

    None when the part was there already, whoever wrote it: of two drivers that label the same part
    the first one counts. Raises ``ConflictError`` when something else has its name.
    """
    ok = pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0
    footer = PartFooter(run=run, part=part, rows=rows.num_rows, ok=ok)
    data = _encode(rows, footer)
    crash_point("part.before_create")
    try:
        store.create(key, data)
    except AlreadyExistsError:
        there = read_part(store, key).footer
        if (there.run, there.part) != (run, part):
            raise ConflictError(f"{store.uri}/{key} is not a part of run {run}") from None
        return None
    crash_point("part.after_create")
    return PublishedPart(footer, sha256(data))


def read_part(store: Store, key: str) -> PublishedPart:
    """A part that somebody has published. Raises ``ConflictError`` when it is none."""
    data = store.read(key)
    try:
        footer = read_footer(data)
    except ValueError:
        raise ConflictError(f"{store.uri}/{key} is not a part of a table of labels") from None
    return PublishedPart(footer, sha256(data))


def read_footer(data: bytes) -> PartFooter:
    """What the bytes of a part say that it is. Raises ``ValueError`` when they are no part."""
    try:
        metadata = pq.read_metadata(io.BytesIO(data))
        footer = PartFooter(**json.loads((metadata.metadata or {})[FOOTER_KEY]))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"no part: {error}") from error
    if footer.rows != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows instead of {footer.rows}")
    return footer


def _encode(rows: pa.Table, footer: PartFooter) -> bytes:
    """The bytes of a part, read back and compared before anybody sees them."""
    metadata = {FOOTER_KEY: json.dumps(asdict(footer)).encode()}
    data = encode_parquet(rows.replace_schema_metadata(metadata), compression="zstd")
    written = pq.ParquetFile(io.BytesIO(data)).read(columns=["key", "etag"])
    if not written.equals(rows.select(["key", "etag"])):
        raise CnnrayError(f"part {footer.part} of run {footer.run} does not read back as written")
    return data
