"""A CSV or Parquet table that names the images and, if it has them, labels, splits and etags.

Paths are local or ``s3://``; nothing else is ever fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from cnnray.datasets.sources.base import MAX_TABLE_ROWS, SPLIT_NAMES, is_hidden, read_each
from cnnray.datasets.sources.rows import (
    BLOCK_BYTES,
    etags,
    named_errors,
    parquet_batches,
    refuse,
    text,
)
from cnnray.errors import DataError, StorageError
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import Store, open_store, split_uri

COLUMN_NAMES = {
    "path": ("uri", "path", "image", "file", "filename", "url"),
    "label": ("label", "class", "category", "target"),
    "split": ("split", "subset"),
    "key": ("key",),
    "etag": ("etag", "e_tag"),
}
"""The names by which a column is found, in any case, when the settings do not name it."""


@dataclass(frozen=True)
class TableSource:
    """The rows of ``file`` in ``store``, or of every Parquet file below ``store``.

    Relative paths are relative to ``store``. The key is the key column, or else the path as given.
    An image whose etag is not that of the table has changed.
    """

    store: Store
    file: str | None = None
    labelled: bool = True
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    key_column: str | None = None
    etag_column: str | None = None

    def partitions(self) -> list[str]:
        """One partition per file."""
        if self.file is not None:
            return [self.file]
        keys = [item.key for item in self.store.list() if not is_hidden(item.key)]
        files = [key for key in keys if key.lower().endswith(".parquet")]
        if not files:
            raise DataError(
                f"no .parquet files in {self.store.uri}",
                hint="name a .csv or .parquet file, or a folder of .parquet files",
            )
        return files

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The rows of one file, in its order; sizes are not known."""
        where = f"{self.store.uri}/{partition}"
        num_rows = 0
        with named_errors(where), self.store.open(partition) as file:
            is_csv = partition.lower().endswith(".csv")
            schema = _csv_schema(file) if is_csv else pq.ParquetFile(file).schema_arrow
            columns = self._columns(schema, where=where)
            names = [*dict.fromkeys(columns.values())]
            batches = _csv_batches(file, names) if is_csv else parquet_batches(file, names)
            for batch in batches:
                for start in range(0, batch.num_rows, MAX_TABLE_ROWS):
                    piece = batch.slice(start, MAX_TABLE_ROWS)
                    yield _entries(piece, columns=columns, where=where, first_row=num_rows + 1)
                    num_rows += piece.num_rows

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The bytes that each path leads to."""
        columns = (entries[name].to_pylist() for name in ("path", "etag"))
        return read_each(self._read, zip(*columns, strict=True))

    def _read(self, image: tuple[str, str]) -> bytes:
        path, etag = image
        store, key = self._find(path)
        return store.read(key, if_match=etag)

    def _find(self, path: str) -> tuple[Store, str]:
        scheme, has_scheme, rest = path.partition("://")
        if not has_scheme:
            return (open_store("/") if path.startswith("/") else self.store), path
        if scheme == "s3":
            return split_uri(path)
        if scheme == "file" and rest.startswith("/"):
            return open_store("/"), rest
        raise StorageError(f"cannot read {path!r}: only local paths and s3:// are supported")

    def _columns(self, schema: pa.Schema, *, where: str) -> dict[str, str]:
        """The name of each column in use, by its role."""
        roles = {"path": self.path_column, "key": self.key_column, "etag": self.etag_column}
        if self.labelled:
            roles |= {"label": self.label_column, "split": self.split_column}
        columns = {}
        for role, name in roles.items():
            found = _find_column(schema, role=role, name=name, where=where)
            if found is not None:
                columns[role] = found
        return columns


def _find_column(schema: pa.Schema, *, role: str, name: str | None, where: str) -> str | None:
    by_lower_name = {column.lower(): column for column in reversed(schema.names)}
    conventional = (by_lower_name.get(known) for known in COLUMN_NAMES[role])
    found = name if name is not None else next(filter(None, conventional), None)
    if found is None and role != "path":
        return None
    if found not in schema.names:
        wanted = repr(name) if name is not None else f"with the {role} of the image"
        raise DataError(
            f"no column {wanted} in {where}: its columns are {', '.join(schema.names)}",
            hint=f"name it with {role}_column",
        )
    if schema.names.count(found) > 1:
        raise DataError(f"{where} has more than one column {found!r}")
    kind = schema.field(found).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(kind) or (pa.types.is_integer(kind) and role in ("label", "key"))):
        raise DataError(
            f"column {found!r} of {where} holds {kind}, not text",
            hint=f"name another one with {role}_column",
        )
    return found


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    )


def _csv_options() -> csv.ParseOptions:
    return csv.ParseOptions(newlines_in_values=True)


def _csv_schema(file: BinaryIO) -> pa.Schema:
    """The column names, all of them text: a label 007 must stay 007."""
    names = csv.open_csv(file, parse_options=_csv_options()).schema.names
    file.seek(0)
    return pa.schema([pa.field(name, pa.string()) for name in names])


def _csv_batches(file: BinaryIO, names: list[str]) -> Iterator[pa.RecordBatch]:
    yield from csv.open_csv(
        file,
        read_options=csv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=_csv_options(),
        convert_options=csv.ConvertOptions(
            include_columns=names, column_types={name: pa.string() for name in names}
        ),
    )


def _entries(
    batch: pa.RecordBatch, *, columns: dict[str, str], where: str, first_row: int
) -> pa.Table:
    def column(role: str) -> pa.Array[Any]:
        if role not in columns:
            return pa.nulls(batch.num_rows, pa.string())
        return text(batch.column(columns[role]))

    path = column("path")
    key = column("key") if "key" in columns else path
    for name, values in (("path", path), ("key", key)):
        refuse(values.is_null(), f"no {name} in {where}", first_row=first_row)
    return pa.Table.from_arrays(
        [
            key,
            path,
            pa.repeat(pa.scalar(0, pa.int64()), batch.num_rows),
            pa.repeat(pa.scalar(-1, pa.int64()), batch.num_rows),
            etags(column("etag")),
            column("label"),
            _splits(column("split"), where=where, first_row=first_row),
        ],
        schema=ENTRY_SCHEMA,
    )


def _splits(values: pa.Array[Any], *, where: str, first_row: int) -> pa.Array[Any]:
    positions = pc.index_in(pc.utf8_lower(values), value_set=pa.array([*SPLIT_NAMES]))
    is_unknown = pc.and_(values.is_valid(), positions.is_null())
    if pc.any(is_unknown).as_py():
        value = values.filter(is_unknown)[0].as_py()
        message = f"{value!r} is not a split in {where}"
        refuse(is_unknown, message, first_row=first_row, hint=f"use {', '.join(SPLIT_NAMES)}")
    return pa.array([*SPLIT_NAMES.values()]).take(positions)
