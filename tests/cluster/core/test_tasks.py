"""Tasks in order: what comes, when it is begun, and what happens when one fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cnnray.cluster.core.tasks import map_in_order
from cnnray.errors import CnnrayError, DataError, UnavailableError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("ray_session"),
]


def test_results_come_in_the_order_of_the_items_whatever_is_done_first() -> None:
    def wait(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    items = [0.6, 0.0, 0.3, 0.0]
    assert list(map_in_order(wait, items, ahead=4, stall_seconds=60)) == items


def test_no_more_are_begun_than_may_wait_to_be_taken(tmp_path: Path) -> None:
    def touch(number: int) -> int:
        (tmp_path / str(number)).touch()
        return number

    results = map_in_order(touch, range(9), ahead=3, stall_seconds=60)
    assert next(results) == 0
    time.sleep(1)
    assert {path.name for path in tmp_path.iterdir()} <= {"0", "1", "2"}
    assert list(results) == [*range(1, 9)]


def test_an_error_comes_in_its_place_as_it_is() -> None:
    def fail(number: int) -> int:
        if number == 2:
            raise DataError("the shard is damaged")
        return number

    results = map_in_order(fail, range(5), ahead=5, stall_seconds=60)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="the shard is damaged"):
        next(results)


def test_a_store_that_gave_no_answer_is_asked_again(tmp_path: Path) -> None:
    def ask(number: int) -> int:
        tries = tmp_path / str(number)
        if not tries.exists():
            tries.touch()
            raise UnavailableError("the store gave no usable answer")
        return number

    assert list(map_in_order(ask, range(3), ahead=3, stall_seconds=60)) == [0, 1, 2]


def test_a_task_that_does_not_end_is_not_waited_for_without_end() -> None:
    def hang(seconds: float) -> None:
        time.sleep(seconds)

    with pytest.raises(CnnrayError, match="no task has finished for 1 s"):
        next(map_in_order(hang, [30.0], ahead=1, stall_seconds=1))
