"""An S3 Inventory in Parquet: the bucket's own list of its objects, named by its manifest.json.

Format: https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html. Keys
in CSV and ORC inventories are URL-encoded, those in Parquet are the keys themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic
from pydantic import BaseModel, Field

from cnnray.datasets.sources.base import read_each
from cnnray.datasets.sources.rows import etags, named_errors, parquet_batches, refuse, text
from cnnray.errors import DataError, MissingObjectError, StorageError
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import Store, split_uri

MAX_MANIFEST_BYTES = 64 << 20

TEXT_COLUMNS = ("bucket", "key")
OPTIONAL_COLUMNS = {
    "size": pa.types.is_integer,
    "e_tag": pa.types.is_string,
    "is_latest": pa.types.is_boolean,
    "is_delete_marker": pa.types.is_boolean,
}
"""Which of them an inventory has is the choice of whoever configured it."""


class DataFile(BaseModel):
    """One Parquet file of an inventory, by its key in the destination bucket."""

    key: str


class InventoryManifest(BaseModel):
    """What is used of an inventory's manifest.json."""

    file_format: str = Field(alias="fileFormat")
    source_bucket: str = Field(alias="sourceBucket")
    destination_bucket: str = Field(alias="destinationBucket")  # arn:aws:s3:::name
    files: tuple[DataFile, ...]


def find_inventory(store: Store, file: str) -> InventoryManifest | None:
    """The manifest of an inventory, or None when the file is none."""
    found = store.head(file)
    if found is None:
        raise MissingObjectError(f"no such file: {store.uri}/{file}")
    if found.size > MAX_MANIFEST_BYTES:
        return None
    try:
        return InventoryManifest.model_validate_json(store.read(file))
    except pydantic.ValidationError:
        return None


@dataclass(frozen=True)
class InventorySource:
    """The objects that the inventory of manifest ``file`` in ``store`` lists.

    Keys are ``s3://bucket/key``. Versions that are not the latest, delete markers and the empty
    objects that consoles make for folders are left out. A partition is the URI of a data file. One
    of a manifest on disk lies beside it, or in a folder ``data`` there or one above.
    """

    store: Store
    file: str

    def partitions(self) -> list[str]:
        """The data files, in the manifest's order. Raises ``DataError`` if they are not Parquet."""
        where = f"{self.store.uri}/{self.file}"
        manifest = find_inventory(self.store, self.file)
        if manifest is None:
            raise DataError(f"{where} is not the manifest of an S3 Inventory")
        if manifest.file_format != "Parquet":
            raise DataError(
                f"the inventory {where} is in {manifest.file_format!r}",
                hint="configure the inventory with the output format Apache Parquet",
            )
        if not manifest.files:
            raise DataError(f"the inventory {where} has no data files")
        if not self.store.uri.startswith("s3://"):
            return [self._find_beside(item.key) for item in manifest.files]
        bucket = manifest.destination_bucket.rpartition(":")[2]
        return [f"s3://{bucket}/{item.key}" for item in manifest.files]

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The objects that one data file lists, in its order."""
        store, file_key = split_uri(partition)
        first_row = 1
        with named_errors(partition), store.open(file_key) as file:
            names = _columns(pq.ParquetFile(file).schema_arrow, where=partition)
            for batch in parquet_batches(file, names):
                yield _entries(batch, where=partition, first_row=first_row)
                first_row += batch.num_rows

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The bytes of each object, unless it is no longer the one in the inventory."""
        columns = (entries[name].to_pylist() for name in ("path", "etag"))
        return read_each(_read, zip(*columns, strict=True))

    def _find_beside(self, key: str) -> str:
        name = PurePosixPath(key).name
        for path in (name, f"data/{name}", f"../data/{name}"):
            if self.store.head(path) is not None:
                return f"{self.store.uri}/{path}"
        raise DataError(
            f"{name!r} of the inventory is not beside {self.store.uri}/{self.file}",
            hint="name the manifest in its bucket, or copy its data files too",
        )


def _read(image: tuple[str, str]) -> bytes:
    uri, etag = image
    store, key = split_uri(uri)
    return store.read(key, if_match=etag)


def _columns(schema: pa.Schema, *, where: str) -> list[str]:
    """The columns in use. Raises ``DataError`` for one that is missing or of another type."""
    names = [*TEXT_COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in schema.names)]
    for name in names:
        is_right = OPTIONAL_COLUMNS.get(name, pa.types.is_string)
        if schema.names.count(name) != 1 or not is_right(schema.field(name).type):
            raise DataError(
                f"{where} is no inventory: its columns are {', '.join(schema.names)}",
                hint="see the column types of S3 Inventory",
            )
    return names


def _entries(batch: pa.RecordBatch, *, where: str, first_row: int) -> pa.Table:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    bucket, key = text(columns["bucket"]), text(columns["key"])
    refuse(pc.or_(bucket.is_null(), key.is_null()), f"no key in {where}", first_row=first_row)
    refuse(pc.match_substring(bucket, "/"), f"no bucket's name in {where}", first_row=first_row)
    uri = pc.binary_join_element_wise("s3://", bucket, "/", key, "")
    count = batch.num_rows
    size = pc.fill_null(columns.get("size", pa.nulls(count, pa.int64())), -1)
    table = pa.Table.from_arrays(
        [
            uri,
            uri,
            pa.repeat(pa.scalar(0, pa.int64()), count),
            size.cast(pa.int64()),
            etags(text(columns.get("e_tag", pa.nulls(count, pa.string())))),
            pa.nulls(count, pa.string()),
            pa.nulls(count, pa.string()),
        ],
        schema=ENTRY_SCHEMA,
    )
    return table.filter(_is_input(columns, key=key, size=size))


def _is_input(
    columns: dict[str, pa.Array[Any]], *, key: pa.Array[Any], size: pa.Array[Any]
) -> pa.Array[Any]:
    kept = pc.invert(pc.and_(pc.ends_with(key, "/"), pc.equal(size, 0)))
    if "is_latest" in columns:
        kept = pc.and_(kept, pc.fill_null(columns["is_latest"], True))
    if "is_delete_marker" in columns:
        kept = pc.and_(kept, pc.invert(pc.fill_null(columns["is_delete_marker"], False)))
    return kept
