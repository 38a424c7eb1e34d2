"""A packed dataset as a source: its shards are the partitions, a row is found by its number.

A row is the one that was listed when its key and etag are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.datasets.manifest import read_manifest
from cnnray.datasets.sources.base import STORE_FAILURES, Entry, entry_tables
from cnnray.errors import ChangedObjectError, DataError, StorageError
from cnnray.storage import Store


@dataclass(frozen=True)
class DatasetSource:
    """The packed samples of every split; ``offset`` of an entry is its row in the shard."""

    store: Store

    def partitions(self) -> list[str]:
        """The paths of the shards."""
        splits = read_manifest(self.store).splits.values()
        return [shard.path for split in splits for shard in split.files]

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The samples of a shard, in its order."""
        split = partition.split("/", 1)[0]
        try:
            with self.store.open(partition) as file:
                table = pq.ParquetFile(file).read(columns=["key", "etag"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.store.uri}/{partition} is damaged: {_reason(error)}") from error
        yield from entry_tables(
            Entry(
                key=key, path=partition, offset=row, length=-1, etag=etag, label=None, split=split
            )
            for row, (key, etag) in enumerate(
                zip(table["key"].to_pylist(), table["etag"].to_pylist(), strict=True)
            )
        )

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The encoded bytes; each row group is read once for neighbouring entries."""
        reader = _RowReader(self.store)
        columns = (entries[name].to_pylist() for name in ("path", "offset", "key", "etag"))
        for path, row, key, etag in zip(*columns, strict=True):
            yield reader.read(path, row, key=key, etag=etag)


class _RowReader:
    """Reads the image of a row, holding the row group that the last one was in."""

    COLUMNS = ("key", "etag", "image")

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = ""
        self.file: Any = None
        self.first = 0
        self.rows: Any = ()  # COLUMNS of the row group, from its row ``first`` on
        self.failed: dict[str, StorageError] = {}  # a damaged shard is not read for each row

    def read(self, path: str, row: int, *, key: str, etag: str) -> bytes | StorageError:
        if path in self.failed:
            return self.failed[path]
        try:
            if path != self.path:
                self.file = pq.ParquetFile(self.store.open(path))
                self.path, self.rows = path, ()
            if not self.first <= row < self.first + len(self.rows):
                self.first, self.rows = self._around(row)
        except STORE_FAILURES:
            raise
        except StorageError as error:
            self.failed[path] = error
        except (pa.ArrowException, OSError) as error:
            self.failed[path] = StorageError(f"{path} is damaged: {_reason(error)}")
        if path in self.failed:
            return self.failed[path]
        if len(self.rows) == 0:
            return ChangedObjectError(f"row {row} is not in {path}")
        found_key, found_etag, image = (
            self.rows[name][row - self.first].as_py() for name in self.COLUMNS
        )
        if (found_key, found_etag) != (key, etag):
            return ChangedObjectError(f"row {row} of {path} is not the image that was listed")
        return cast(bytes, image)

    def _around(self, row: int) -> tuple[int, Any]:
        """The first row of the row group that holds ``row``, and the row group."""
        first = 0
        for group in range(self.file.num_row_groups):
            num_rows = self.file.metadata.row_group(group).num_rows
            if row < first + num_rows:
                return first, self.file.read_row_group(group, columns=[*self.COLUMNS])
            first += num_rows
        return 0, ()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())
