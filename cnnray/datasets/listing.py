"""List a source in this process: many partitions at a time, in one fixed order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import pyarrow as pa

from cnnray.datasets.sources import Source

TABLES_AHEAD = 1
"""Tables of a partition that wait for the consumer; one more is in the hands of its thread."""


def list_in_order(source: Source, *, concurrency: int = 8) -> Iterator[pa.Table]:
    """Every entry of a source (``ENTRY_SCHEMA``), partition by partition, in the source's order.

    ``concurrency`` threads list ahead: of at most twice as many partitions, a table or two each. An
    error is raised after the tables that precede it. The threads have ended when the iterator has.
    Raises whatever the source's listing does.
    """
    stopped = threading.Event()
    feeds: deque[_Feed] = deque()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="list")
    try:
        # In order, so that the partition that is consumed is always among those being listed.
        for partition in source.partitions():
            feeds.append(_Feed())
            pool.submit(_list, source, partition, feed=feeds[-1], stopped=stopped)
            if len(feeds) == 2 * concurrency:
                yield from feeds[0].tables()
                feeds.popleft()
        while feeds:
            yield from feeds[0].tables()
            feeds.popleft()
    finally:
        stopped.set()
        for feed in feeds:
            feed.room.release()
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Feed:
    """The tables of one partition on their way to the consumer; None ends them."""

    items: SimpleQueue[pa.Table | Exception | None] = field(default_factory=SimpleQueue)
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(TABLES_AHEAD))

    def tables(self) -> Iterator[pa.Table]:
        while (item := self.items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            self.room.release()
            yield item


def _list(source: Source, partition: str, *, feed: _Feed, stopped: threading.Event) -> None:
    try:
        for table in source.list(partition):
            feed.room.acquire()
            if stopped.is_set():
                return
            feed.items.put(table)
        feed.items.put(None)
    except Exception as error:
        feed.items.put(error)
