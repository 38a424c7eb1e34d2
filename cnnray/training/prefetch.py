"""Draw batches ahead, off the thread that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, of which a thread draws ``depth`` ahead; errors come in their place.

    The deadline for an item is its source's.
    """
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ahead = deque[Any](thread.submit(next, iterator, end) for _ in range(depth))
    try:
        while (item := ahead.popleft().result()) is not end:
            ahead.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
