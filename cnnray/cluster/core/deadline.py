"""A deadline for what has none of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_SECONDS = 5.0
"""For the thread to end once nobody wants more; after that it is left behind."""


class DeadlineError(Exception):
    """An item took longer than it may."""


def within(seconds: float, items: Iterator[T]) -> Iterator[T]:
    """The same items, drawn one ahead by a thread of their own; errors come in their place.

    Raises ``DeadlineError`` when an item takes longer than ``seconds``. The thread closes a
    generator when nobody wants more of it.
    """
    drawn: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    is_over = threading.Event()
    thread = threading.Thread(
        target=_draw, args=(items, drawn, is_over), daemon=True, name="deadline"
    )
    thread.start()
    try:
        while True:
            try:
                kind, value = drawn.get(timeout=seconds)
            except queue.Empty:
                raise DeadlineError(f"nothing came for {seconds:g} s") from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        is_over.set()
        _empty(drawn)
        thread.join(timeout=CLOSE_SECONDS)


def _draw(
    items: Iterator[T], drawn: queue.Queue[tuple[str, Any]], is_over: threading.Event
) -> None:
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
