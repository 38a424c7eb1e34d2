"""Batches drawn ahead: the same ones, in order, with their errors, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cnnray.training.prefetch import prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_all_items_come_in_their_order() -> None:
    assert list(prefetch(range(100))) == list(range(100))
    wait_for_no_threads()


def test_the_next_items_are_drawn_while_one_is_in_use() -> None:
    drawn = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(9):
            drawn.release()
            yield number

    ahead = prefetch(items(), depth=2)
    assert next(ahead) == 0
    for _ in range(3):  # that one and two that wait
        assert drawn.acquire(timeout=10)
    assert not drawn.acquire(timeout=0.2)
    ahead.close()


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the data ended")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the data ended"):
        next(ahead)


def test_a_consumer_that_leaves_leaves_no_thread() -> None:
    ahead = prefetch(iter(range(10**9)))
    assert next(ahead) == 0
    ahead.close()
    wait_for_no_threads()
