"""A packed dataset as a source: its shards are the partitions, a row is found by its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.datasets.manifest import read_manifest
from cnnray.datasets.sources.base import Entry, entry_tables
from cnnray.errors import DataError, StorageError
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
        for path, row in zip(
            entries["path"].to_pylist(), entries["offset"].to_pylist(), strict=True
        ):
            yield reader.read(path, row)


class _RowReader:
    """Reads the image of a row, holding the row group that the last one was in."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = ""
        self.file: Any = None
        self.first = 0
        self.images: Any = ()
        self.failed: dict[str, StorageError] = {}  # a damaged shard is not read for each row

    def read(self, path: str, row: int) -> bytes | StorageError:
        if path in self.failed:
            return self.failed[path]
        try:
            if path != self.path:
                self.file = pq.ParquetFile(self.store.open(path))
                self.path, self.images = path, ()
            if not self.first <= row < self.first + len(self.images):
                self.first, self.images = self._around(row)
        except StorageError as error:
            self.failed[path] = error
        except (pa.ArrowException, OSError) as error:
            self.failed[path] = StorageError(f"{path} is damaged: {_reason(error)}")
        if path in self.failed:
            return self.failed[path]
        if len(self.images) == 0:
            return StorageError(f"row {row} is not in {path}")
        return cast(bytes, self.images[row - self.first].as_py())

    def _around(self, row: int) -> tuple[int, Any]:
        """The first row of the row group that holds ``row``, and its images."""
        first = 0
        for group in range(self.file.num_row_groups):
            num_rows = self.file.metadata.row_group(group).num_rows
            if row < first + num_rows:
                return first, self.file.read_row_group(group, columns=["image"])["image"]
            first += num_rows
        return 0, ()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())
