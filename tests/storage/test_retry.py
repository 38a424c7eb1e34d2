"""Deadlines, delays and the number of requests in flight."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnnray.storage import retry
from cnnray.storage.retry import Deadline, Pacer, delay_seconds

MIB = 2**20


def test_an_object_has_a_minute_and_a_second_for_each_mebibyte() -> None:
    assert Deadline().seconds == 60
    assert Deadline(10 * MIB).seconds == 70


def test_a_deadline_grows_with_the_largest_size_that_is_told() -> None:
    deadline = Deadline()
    deadline.allow(10 * MIB)
    deadline.allow(3 * MIB)
    assert deadline.seconds == 70


def test_a_deadline_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 0.01)
    deadline = Deadline()
    time.sleep(0.02)
    assert deadline.left() < 0 < deadline.elapsed()


@pytest.mark.parametrize(("failures", "longest"), [(1, 0.1), (3, 0.4), (6, 3.2), (9, 5), (5000, 5)])
def test_delays_are_drawn_from_the_whole_of_a_growing_span(failures: int, longest: float) -> None:
    delays = [delay_seconds(failures) for _ in range(300)]
    assert 0 <= min(delays) < longest * 0.1
    assert longest * 0.9 < max(delays) <= longest


def test_delays_leave_the_random_numbers_of_others_alone() -> None:
    import random

    random.seed(1)
    expected = random.random()
    random.seed(1)
    delay_seconds(3)
    assert random.random() == expected


# Pacing


def test_a_pacer_halves_and_recovers_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PACE_SECONDS", 0)
    pacer = Pacer(16)
    pacer.slow_down()
    assert pacer.limit == 8
    for _ in range(7):
        pacer.succeeded()
    assert pacer.limit == 8
    pacer.succeeded()
    assert pacer.limit == 9


def test_a_refusal_ends_the_run_of_successes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PACE_SECONDS", 0)
    pacer = Pacer(8)
    for note in (pacer.slow_down, *[pacer.succeeded] * 3, pacer.slow_down, pacer.succeeded):
        note()
    assert pacer.limit == 2


def test_one_overload_that_many_requests_meet_halves_once() -> None:
    pacer = Pacer(16)
    for _ in range(16):
        pacer.slow_down()
    assert pacer.limit == 8


def test_a_pacer_stays_between_one_and_its_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PACE_SECONDS", 0)
    pacer = Pacer(4)
    for _ in range(10):
        pacer.slow_down()
    assert pacer.limit == 1
    for _ in range(100):
        pacer.succeeded()
    assert pacer.limit == 4


def test_no_more_requests_than_the_limit_are_in_flight() -> None:
    pacer = Pacer(6)
    pacer.slow_down()
    flying, most, lock = [], [], threading.Lock()

    def request(number: int) -> None:
        with pacer.slot(10):
            with lock:
                flying.append(number)
                most.append(len(flying))
            time.sleep(0.005)
            with lock:
                flying.remove(number)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(request, range(36)))
    assert max(most) == 3


def test_a_place_that_does_not_become_free_is_not_waited_for_beyond_the_end() -> None:
    pacer = Pacer(1)
    with pacer.slot(1), pytest.raises(TimeoutError), pacer.slot(0.01):
        pass
    with pacer.slot(0):
        pass


def test_a_request_that_fails_gives_its_place_back() -> None:
    pacer = Pacer(1)
    with pytest.raises(KeyError), pacer.slot(1):
        raise KeyError
    with pacer.slot(0):
        pass
