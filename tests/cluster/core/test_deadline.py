"""Items that are drawn by a thread: what comes, when it is too late, and that the thread ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cnnray.cluster.core.deadline import DeadlineError, within


def test_all_items_come_in_order():
    assert list(within(5, iter(range(100)))) == [*range(100)]


def test_an_error_comes_in_its_place():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second is bad")

    drawn = within(5, items())
    assert next(drawn) == 1
    with pytest.raises(ValueError, match="the second is bad"):
        next(drawn)


def test_an_item_that_takes_too_long_is_not_waited_for():
    release = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        release.wait(30)

    drawn = within(0.2, items())
    assert next(drawn) == 1
    threading.Timer(0.5, release.set).start()  # or closing would wait for the thread
    with pytest.raises(DeadlineError, match="nothing came for 0.2 s"):
        next(drawn)


def test_a_generator_that_nobody_wants_more_of_is_closed_by_its_thread():
    closed_by: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed_by.append(threading.current_thread().name)

    drawn = within(5, items())
    next(drawn)
    drawn.close()
    assert closed_by == ["deadline"]
    time.sleep(0.1)
    assert "deadline" not in {thread.name for thread in threading.enumerate()}
