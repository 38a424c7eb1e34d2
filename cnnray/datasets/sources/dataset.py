"""A packed dataset as a source: its shards are the partitions, a row is found by its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.datasets.manifest import read_manifest
from cnnray.datasets.sources.base import Entry, entry_tables
from cnnray.errors import StorageError
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
        with self.store.open(partition) as file:
            table = pq.ParquetFile(file).read(columns=["key", "etag"])
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
        open_path, shard, first, images = "", None, 0, None
        for path, row in zip(
            entries["path"].to_pylist(), entries["offset"].to_pylist(), strict=True
        ):
            if path != open_path:
                shard = _RowGroups(self.store, path)
                open_path, images = path, None
            assert shard is not None
            if images is None or not first <= row < first + len(images):
                first, images = shard.around(row)
            yield images[row - first].as_py()


class _RowGroups:
    """Reads the row group of a shard that holds a row."""

    def __init__(self, store: Store, path: str) -> None:
        self.file = pq.ParquetFile(store.open(path))

    def around(self, row: int) -> tuple[int, pa.ChunkedArray]:
        """The first row of the row group, and its images."""
        first = 0
        for group in range(self.file.num_row_groups):
            num_rows = self.file.metadata.row_group(group).num_rows
            if row < first + num_rows:
                return first, self.file.read_row_group(group, columns=["image"])["image"]
            first += num_rows
        raise StorageError(f"row {row} is not in the shard: it has {first}")
