"""A deadline for what has none of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar, cast

T = TypeVar("T")

CLOSE_SECONDS = 5.0
"""For the thread to end once nobody wants more; after that it is left behind."""


_drawing = threading.local()


class DeadlineError(Exception):
    """An item took longer than it may."""


class Drawn(Iterator[T]):
    """The items of a source, drawn one ahead by a thread from now on; errors come in their place.

    ``next`` raises ``DeadlineError`` when an item takes longer than ``seconds``. The thread ends,
    and closes a source that is a generator, after the last item or after ``close``.
    """

    def __init__(self, items: Iterator[T], *, seconds: float) -> None:
        self._seconds = seconds
        self._drawn: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=_draw, args=(items, self._drawn, self._is_over), daemon=True, name="deadline"
        )
        self._thread.start()

    def __next__(self) -> T:
        if self._is_over.is_set():
            raise StopIteration
        try:
            kind, value = self._drawn.get(timeout=self._seconds)
        except queue.Empty:
            raise DeadlineError(f"nothing came for {self._seconds:g} s") from None
        if kind == "item":
            return cast(T, value)
        self._is_over.set()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Draw no more; a thread that waits for its source is left behind after some seconds."""
        self._is_over.set()
        _empty(self._drawn)
        self._thread.join(timeout=CLOSE_SECONDS)
        _empty(self._drawn)
        self._drawn.put(("end", None))  # for another thread that waits in next()


def within(seconds: float, items: Iterator[T]) -> Iterator[T]:
    """The same items, drawn one ahead by a thread of their own; errors come in their place.

    Raises ``DeadlineError`` when an item takes longer than ``seconds``. The thread closes a
    generator when nobody wants more of it.
    """
    with contextlib.closing(Drawn(items, seconds=seconds)) as drawn:
        yield from drawn


def end_of_drawing() -> threading.Event:
    """Set when nobody wants more of what this thread draws; never, in a thread that draws nothing.

    For a source that waits where closing it does not reach.
    """
    is_over: threading.Event = getattr(_drawing, "is_over", None) or threading.Event()
    return is_over


def _draw(
    items: Iterator[T], drawn: queue.Queue[tuple[str, Any]], is_over: threading.Event
) -> None:
    _drawing.is_over = is_over
    try:
        for item in items:
            drawn.put(("item", item))
            if is_over.is_set():
                break
        else:
            drawn.put(("end", None))
    except BaseException as error:
        drawn.put(("error", error))
    finally:
        if isinstance(items, Generator):
            items.close()


def _empty(drawn: queue.Queue[Any]) -> None:
    """Make room for what the thread may be about to put."""
    while True:
        try:
            drawn.get_nowait()
        except queue.Empty:
            return
