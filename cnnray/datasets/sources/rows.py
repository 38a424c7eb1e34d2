"""Rows of a user's table: streamed in bounded memory, checked, and every fault named by its row.

Only the columns in use are read, and no extension type is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnnray.datasets.sources.base import MAX_TABLE_ROWS
from cnnray.errors import DataError

BLOCK_BYTES = 1 << 20


def parquet_batches(file: BinaryIO, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of some columns, up to MAX_TABLE_ROWS rows each."""
    # A buffer streams the pages; without it a whole column of the row group is in memory.
    parquet = pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
    yield from parquet.iter_batches(batch_size=MAX_TABLE_ROWS, columns=names, use_threads=False)


def text(values: pa.Array[Any]) -> pa.Array[Any]:
    """A column as UTF-8 text, with None for what is empty."""
    values = values.cast(pa.string())
    values.validate(full=True)  # Parquet may hold text that is not UTF-8
    return pc.if_else(pc.equal(values, pa.scalar("")), None, values)


def etags(values: pa.Array[Any]) -> pa.Array[Any]:
    """Etags, as text, without the quotes that HTTP puts around them; empty where there is none."""
    return pc.fill_null(pc.utf8_trim(values, '"'), "")


def refuse(is_bad: pa.Array[Any], message: str, *, first_row: int, hint: str | None = None) -> None:
    """Raise ``DataError`` with the number of the first row, counted from ``first_row``, if any."""
    position = pc.index(is_bad, True).as_py()
    if position >= 0:
        raise DataError(f"{message}, row {first_row + position}", hint=hint)


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Arrow's errors as ``DataError``: a damaged Parquet file is an ``OSError`` there."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"cannot read {where}: {str(error).partition(chr(10))[0]}") from error
