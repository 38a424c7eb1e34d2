"""Tables in order: what comes, when it is begun, and what happens when a task fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from cnnray.cluster.core.ordered import OrderedStream, ReadAhead, store_in_order
from cnnray.cluster.core.streaming import TrainingPause, is_retried
from cnnray.errors import CnnrayError, DataError, IncompleteError, UnavailableError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("ray_session"),
]

AHEAD = ReadAhead(tasks=4, num_bytes=64e6, stall_seconds=60)


def numbers(tables: Iterator[pa.Table]) -> list[float]:
    return [table["n"][0].as_py() for table in tables]


def row(number: float) -> pa.Table:
    return pa.table({"n": [number]})


def test_tables_come_in_the_order_of_the_items_whatever_is_done_first() -> None:
    def wait(seconds: float) -> pa.Table:
        time.sleep(seconds)
        return row(seconds)

    items = [0.6, 0.0, 0.3, 0.0]
    assert numbers(OrderedStream(wait, items, ahead=AHEAD)) == items
    references = store_in_order(wait, items, stall_seconds=60)
    assert numbers(iter(ray.get(references))) == items


def test_a_stream_of_several_executions_has_every_item_once_in_order() -> None:
    assert numbers(OrderedStream(row, range(45), ahead=AHEAD, max_units=20)) == [*range(45)]


def test_an_execution_begins_while_the_one_before_is_being_used() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    with closing(OrderedStream(row, items(), ahead=AHEAD, max_units=20)) as stream:
        assert len(taken) == 20
        for _ in range(18):
            next(stream)
        assert len(taken) == 40


def touch(folder: Path, number: int) -> pa.Table:
    """Leaves a file, and makes 20 MB."""
    (folder / str(number)).touch()
    return row(number).append_column("pixels", pa.array([bytes(20_000_000)]))


def test_what_waits_to_be_used_is_bounded_in_bytes(tmp_path: Path) -> None:
    # The object store of these tests has 300 MB: 40 tables of 20 MB would not fit.
    stream = OrderedStream(partial(touch, tmp_path), range(40), ahead=AHEAD)
    assert next(stream)["n"][0].as_py() == 0
    time.sleep(3)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert begun == len(list(tmp_path.iterdir())) <= 10
    assert numbers(stream) == [*range(1, 40)]


class Counting(TrainingPause):
    """Counts the steps of the scheduling loop, in this process."""

    steps = 0

    def on_execution_step(self, executor: Any) -> None:
        type(self).steps += 1
        super().on_execution_step(executor)


def test_an_executor_that_waits_makes_few_steps(tmp_path: Path) -> None:
    stream = OrderedStream(partial(touch, tmp_path), range(40), ahead=AHEAD, pause=Counting)
    with closing(stream):
        next(stream)
        time.sleep(3)  # until its output waits to be used, when it would poll without a pause
        begin, started = Counting.steps, time.monotonic()
        time.sleep(2)
        assert 1 < (Counting.steps - begin) / (time.monotonic() - started) < 60


def test_a_stream_that_is_closed_early_leaves_no_thread_and_begins_nothing(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    stream = OrderedStream(partial(touch, tmp_path), range(40), ahead=AHEAD)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    deadline = time.monotonic() + 30
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(2)
    assert len(list(tmp_path.iterdir())) == begun


def test_an_error_comes_as_it_is_and_ends_the_stream() -> None:
    def fail(number: int) -> pa.Table:
        if number == 2:
            raise DataError("the shard is damaged", hint="pack it again")
        return row(number)

    stream = OrderedStream(fail, range(5), ahead=AHEAD)
    with pytest.raises(DataError, match="the shard is damaged\nhint: pack it again"):
        numbers(stream)
    assert numbers(stream) == []
    with pytest.raises(DataError, match="the shard is damaged\nhint: pack it again"):
        store_in_order(fail, range(5), stall_seconds=60)


def test_a_bug_is_named() -> None:
    def fail(number: int) -> pa.Table:
        raise ValueError("so wrong")

    with pytest.raises(CnnrayError, match="so wrong"):
        numbers(OrderedStream(fail, range(5), ahead=AHEAD))


def once(folder: Path, act: Callable[[], None], number: int) -> pa.Table:
    """Acts at the first try for each number."""
    if not (folder / str(number)).exists():
        (folder / str(number)).touch()
        act()
    return pa.table({"n": [number], "is_retry": [is_retried()]})


def refuse() -> None:
    raise UnavailableError("the store gave no usable answer")


def test_a_store_that_gave_no_answer_is_asked_again(tmp_path: Path) -> None:
    assert numbers(OrderedStream(partial(once, tmp_path, refuse), range(3), ahead=AHEAD)) == [
        0,
        1,
        2,
    ]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_whose_worker_died_is_done_again_and_knows_it(tmp_path: Path) -> None:
    (tmp_path / "0").touch()  # 0 has had its first try
    tables = list(OrderedStream(partial(once, tmp_path, die), range(2), ahead=AHEAD))
    assert [table.to_pylist() for table in tables] == [
        [{"n": 0, "is_retry": False}],
        [{"n": 1, "is_retry": True}],
    ]


def test_a_task_that_kills_every_worker_ends_the_stream() -> None:
    def kill(number: int) -> pa.Table:
        die()
        return row(number)

    with pytest.raises(IncompleteError, match="a worker failed"):
        numbers(OrderedStream(kill, range(2), ahead=AHEAD))


def test_a_task_that_does_not_end_is_not_waited_for_without_end() -> None:
    def hang(number: int) -> pa.Table:
        time.sleep(60)
        return row(number)

    ahead = ReadAhead(tasks=1, num_bytes=64e6, stall_seconds=3)
    started = time.monotonic()
    with pytest.raises(IncompleteError, match="no worker has finished anything for 3 s"):
        numbers(OrderedStream(hang, [1], ahead=ahead))
    assert time.monotonic() - started < 30
