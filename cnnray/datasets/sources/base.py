"""What every source is, and what they share: entries, split names, concurrent reads."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import AccessDeniedError, StorageError, UnavailableError
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import READ_CONCURRENCY

MAX_TABLE_ROWS = 20_000
"""A few MiB of names: a listing holds some tables of each partition that is under way."""

STORE_FAILURES = (AccessDeniedError, UnavailableError)
"""What is wrong with the store or the credentials, and so is no fact about one image."""

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""What users call the splits, in lower case, and what cnnray calls them."""

Item = TypeVar("Item")


class Source(Protocol):
    """A collection of images: lists them, partition by partition, and reads their bytes."""

    def partitions(self) -> list[str]:
        """The units of listing (a folder, a tar, a file of a table), in a fixed order; cheap.

        Raises ``DataError`` when the source holds no unit at all.
        """

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The partition's inputs, in a fixed order: ``ENTRY_SCHEMA``, up to MAX_TABLE_ROWS rows.

        Raises ``DataError`` where the partition is broken, after the tables that precede the break.
        """

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The encoded bytes of each entry, in the order given, or the error that it met.

        An entry with an etag whose object has another one by now is a ``ChangedObjectError``.
        Raises STORE_FAILURES: no image is at fault.
        """


class Entry(NamedTuple):
    """One row of ``ENTRY_SCHEMA``."""

    key: str
    path: str
    offset: int
    length: int
    etag: str
    label: str | None
    split: str | None


def is_first_of_key(entries: pa.Table) -> pa.BooleanArray:
    """For each entry, whether none before it has its key."""
    row = pa.array(np.arange(entries.num_rows))
    first = (
        pa.table({"key": entries["key"], "row": row}).group_by("key").aggregate([("row", "min")])
    )
    return pc.is_in(row, value_set=first["row_min"].combine_chunks())


def copy_rows(entries: pa.Table, start: int, count: int) -> pa.Table:
    """Some rows as a table of their own: a slice would travel with the whole table's memory."""
    stop = min(start + count, entries.num_rows)
    return entries.take(pa.array(np.arange(start, stop)))


def entry_tables(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """Gather entries into bounded tables; those before an error come out before it is raised."""
    batch: list[Entry] = []
    try:
        for entry in entries:
            batch.append(entry)
            if len(batch) == MAX_TABLE_ROWS:
                yield _table(batch)
                batch = []
    except Exception:
        if batch:
            yield _table(batch)
        raise
    if batch:
        yield _table(batch)


def _table(batch: list[Entry]) -> pa.Table:
    columns = zip(*batch, strict=True)
    arrays = [pa.array(column, f.type) for column, f in zip(columns, ENTRY_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ENTRY_SCHEMA)


def is_hidden(key: str) -> bool:
    """Whether the file or a folder above it is named with a leading dot."""
    return key.startswith(".") or "/." in key


READ_TOGETHER = 4
"""Items that one thread reads in a row: handing a single local file over costs as much as reading
it does."""


def read_each(
    read: Callable[[Item], bytes], items: Iterable[Item]
) -> Iterator[bytes | StorageError]:
    """Apply ``read`` to every item concurrently; results in order, few of them held at a time.

    A ``StorageError`` takes the item's place. Raises STORE_FAILURES where the item would come.
    """

    stopped = threading.Event()

    def attempt(run: list[Item]) -> list[bytes | StorageError]:
        results: list[bytes | StorageError] = []
        for item in run:
            if stopped.is_set():
                break
            try:
                results.append(read(item))
            except StorageError as error:
                results.append(error)
                if isinstance(error, STORE_FAILURES):
                    break
        return results

    pending: deque[Future[list[bytes | StorageError]]] = deque()
    source = iter(items)
    try:
        while run := list(itertools.islice(source, READ_TOGETHER)):
            pending.append(_pool().submit(attempt, run))
            if len(pending) == 2 * READ_CONCURRENCY:
                yield from map(_or_failure, pending.popleft().result())
        while pending:
            yield from map(_or_failure, pending.popleft().result())
    finally:
        stopped.set()
        for future in pending:
            future.cancel()


def _or_failure(result: bytes | StorageError) -> bytes | StorageError:
    if isinstance(result, STORE_FAILURES):
        raise result
    return result


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # One per process, since storage's clients, and their connections, belong to threads.
    return ThreadPoolExecutor(READ_CONCURRENCY, thread_name_prefix="read")
