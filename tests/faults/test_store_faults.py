"""The client against a store that fails: what is asked again, how long, and what is said then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cnnray.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ChangedObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.storage import READ_CONCURRENCY, Store, connection, open_store, retry, s3

pytestmark = pytest.mark.timeout(60)

DATA = bytes(range(256)) * 40
OUTAGES = ("503", "500", "429", "reset", "lost_reply")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits, and a connection that has learned nothing of the store yet."""
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MAX_DELAY_SECONDS", 0.05)
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 20.0)
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(connection, "_connections", {})


def gets(chaos: Any) -> int:
    return len(chaos.operations(operation="GetObject"))


# Reading


@pytest.mark.parametrize("action", OUTAGES)
def test_a_read_survives_six_failures_in_a_row(chaos: Any, chaos_store: Store, action: str) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET", "times": 6})
    assert chaos_store.read("key") == DATA
    assert gets(chaos) == 7


@pytest.mark.parametrize("action", ["truncate", "stall", "no_headers"])
def test_a_body_that_breaks_off_is_read_again(chaos: Any, chaos_store: Store, action: str) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET", "times": 2})
    assert chaos_store.read("key") == DATA
    assert chaos_store.read("key", offset=10, length=20) == DATA[10:30]


@pytest.mark.parametrize("action", ["503", "500", "reset", "truncate"])
def test_a_store_that_always_fails_is_asked_a_bounded_number_of_times(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET"})
    with pytest.raises(UnavailableError, match="key: the store gave no usable answer") as caught:
        chaos_store.read("key")
    # aiohttp asks once more by itself when a connection that it had kept open turns out to be dead
    most = retry.MAX_ATTEMPTS * (2 if action == "reset" else 1)
    assert retry.MAX_ATTEMPTS <= gets(chaos) <= most
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("action", ["drip", "no_headers", "stall", "503"])
def test_no_object_takes_longer_than_its_deadline(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 1.0)
    monkeypatch.setattr(retry, "MAX_ATTEMPTS", 1000)
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET", "bytes_per_second": 50.0})
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        chaos_store.read("key")
    assert time.monotonic() - started < 2.5


def test_a_larger_object_may_take_longer(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 0.3)
    monkeypatch.setattr(retry, "BYTES_PER_SECOND", len(DATA) / 10)
    chaos_store.write("key", DATA)
    chaos.server.set_rules(
        {"action": "drip", "method": "GET", "bytes_per_second": float(len(DATA))}
    )
    assert chaos_store.read("key") == DATA


@pytest.mark.parametrize("method", ["read", "head", "delete", "open"])
def test_what_is_denied_is_not_asked_again(chaos: Any, chaos_store: Store, method: str) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "access_denied"})
    before = len(chaos.operations())
    with pytest.raises(AccessDeniedError, match=r"access denied: s3://.*/key"):
        getattr(chaos_store, method)("key")
    # A read that the fast reader is denied is asked once more, by the client that says why.
    assert len(chaos.operations()) == before + (2 if method == "read" else 1)


def test_wrong_bytes_are_read_again(chaos: Any, chaos_store: Store) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "flip", "method": "GET", "times": 1})
    assert chaos_store.read("key") == DATA
    assert gets(chaos) == 2


def test_bytes_that_are_wrong_twice_are_never_returned(chaos: Any, chaos_store: Store) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "flip", "method": "GET"})
    with pytest.raises(StorageError, match="checksum.*key") as caught:
        chaos_store.read("key")
    assert not isinstance(caught.value, UnavailableError)
    assert gets(chaos) == 2


def test_an_object_that_is_replaced_between_attempts_is_noticed(
    chaos: Any, chaos_store: Store
) -> None:
    chaos_store.write("key", DATA)
    etag = chaos_store.head("key").etag
    chaos_store.write("key", DATA[::-1])
    chaos.server.set_rules({"action": "503", "method": "GET", "times": 1})
    with pytest.raises(ChangedObjectError):
        chaos_store.read("key", if_match=etag)


# Writing


@pytest.mark.parametrize("action", OUTAGES)
def test_a_creation_survives_failures_and_happens_once(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    chaos.server.set_rules({"action": action, "method": "PUT", "times": 2})
    chaos_store.create("key", DATA)
    assert chaos_store.read("key") == DATA
    assert chaos.server.puts_per_key(chaos.bucket)["key"] == 1


@pytest.mark.parametrize("action", ["409", "412"])
def test_a_storm_of_refusals_of_a_name_that_is_free_passes(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    chaos.server.set_rules({"action": action, "method": "PUT", "times": 2})
    chaos_store.create("key", DATA)
    assert chaos_store.read("key") == DATA


def test_a_name_that_is_refused_for_ever_though_free_is_given_up(
    chaos: Any, chaos_store: Store
) -> None:
    chaos.server.set_rules({"action": "412", "method": "PUT"})
    with pytest.raises(UnavailableError, match="yet is not there"):
        chaos_store.create("key", DATA)
    assert len(chaos.operations(operation="PutObject")) == s3.CREATE_ROUNDS


def test_conflicts_to_the_end_leave_the_winner_alone(chaos: Any, chaos_store: Store) -> None:
    chaos_store.create("key", b"theirs")
    chaos.server.set_rules({"action": "409", "method": "PUT"})
    with pytest.raises(AlreadyExistsError):
        chaos_store.create("key", DATA)
    chaos_store.create("key", b"theirs")


@pytest.mark.parametrize("action", ["503", "lost_reply"])
def test_two_creators_agree_on_one_winner_whatever_is_lost(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    chaos.server.set_rules({"action": action, "method": "PUT", "probability": 0.5, "seed": 7})

    def create(number: int) -> bytes | None:
        data = b"%d" % number
        try:
            chaos_store.create("key", data)
        except AlreadyExistsError:
            return None
        return data

    with ThreadPoolExecutor(6) as pool:
        winners = [data for data in pool.map(create, range(6)) if data is not None]
    assert winners == [chaos_store.read("key")]
    assert chaos.server.puts_per_key(chaos.bucket)["key"] == 1


def test_a_store_that_ignores_conditions_is_found_out(chaos: Any, chaos_store: Store) -> None:
    chaos.server.set_rules({"action": "ignore_condition"})
    assert not chaos_store.refuses_overwrite("probe")


@pytest.mark.parametrize("action", ["503", "lost_reply", "reset"])
def test_the_probe_is_right_in_bad_weather(chaos: Any, chaos_store: Store, action: str) -> None:
    chaos.server.set_rules({"action": action, "method": "PUT", "times": 1})
    assert chaos_store.refuses_overwrite("probe")


def test_a_single_writer_overwrites_nothing_where_conditions_are_ignored(
    chaos: Any, chaos_store: Store
) -> None:
    chaos.server.set_rules({"action": "ignore_condition"})
    alone = open_store(chaos_store.uri, single_writer=True)
    alone.create("key", b"first")
    with pytest.raises(AlreadyExistsError):
        alone.create("key", b"second")
    assert alone.read("key") == b"first"
    assert [item.condition for item in chaos.operations(operation="PutObject")] == [""]


@pytest.mark.parametrize("action", OUTAGES)
def test_a_deletion_survives_failures(chaos: Any, chaos_store: Store, action: str) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "DELETE", "times": 2})
    chaos_store.delete("key")
    assert chaos_store.head("key") is None


# Listing


@pytest.mark.parametrize("action", [*OUTAGES, "truncate", "stall"])
def test_a_listing_survives_failures_of_its_pages(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    keys = [f"{number:02d}" for number in range(10)]
    for key in keys:
        chaos_store.write(key, b"x")
    chaos.server.set_page_size(3)
    chaos.server.set_rules({"action": action, "operation": "ListObjectsV2", "nth": [1, 3, 4]})
    assert [item.key for item in chaos_store.list()] == keys


# Outages


def test_a_store_that_is_killed_and_comes_back_is_waited_for(
    killable: Any, use_environment: Callable[[Mapping[str, str]], None]
) -> None:
    use_environment(killable.server.environment)
    store = open_store(f"s3://{killable.bucket}")
    store.write("key", DATA)
    killable.server.kill()
    restart = threading.Timer(1.5, killable.server.start)
    restart.start()
    try:
        # Many more refused connections than attempts are allowed.
        assert store.read("key") == DATA
    finally:
        restart.join()


def test_a_store_that_is_killed_for_good_is_unavailable_at_the_deadline(
    killable: Any,
    use_environment: Callable[[Mapping[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_environment(killable.server.environment)
    store = open_store(f"s3://{killable.bucket}")
    store.write("key", DATA)
    killable.server.kill()
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 1.0)
    monkeypatch.setattr(connection, "FIRST_CONTACT_SECONDS", 0.0)  # not for a store once reached
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        store.read("key")
    assert 0.8 < time.monotonic() - started < 2.5


def test_a_store_that_was_never_reached_is_unavailable_and_soon_said_to_be(
    killable: Any,
    use_environment: Callable[[Mapping[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_environment(killable.server.environment)
    killable.server.kill()
    monkeypatch.setattr(connection, "FIRST_CONTACT_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="hint: check AWS_ENDPOINT_URL") as caught:
        open_store(f"s3://{killable.bucket}").read("key")
    assert time.monotonic() - started < 10
    assert caught.value.exit_code == 4


# Pace


def test_slow_down_lowers_the_pace_and_success_raises_it(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PACE_SECONDS", 0.0)
    chaos_store.write("key", b"x")
    pacer = connection.connect().pacer
    chaos.server.set_rules({"action": "503", "method": "GET", "times": 3})
    chaos_store.read("key")
    assert pacer.limit == READ_CONCURRENCY // 8
    for _ in range(10):
        chaos_store.read("key")
    assert pacer.limit > READ_CONCURRENCY // 8


def test_many_readers_get_through_a_store_that_refuses_a_third(
    chaos: Any, chaos_store: Store
) -> None:
    for number in range(8):
        chaos_store.write(f"{number}", DATA)
    chaos.server.set_rules({"action": "503", "probability": 0.3, "seed": 3})
    with ThreadPoolExecutor(READ_CONCURRENCY) as pool:
        bodies = list(pool.map(lambda number: chaos_store.read(f"{number % 8}"), range(100)))
    assert set(bodies) == {DATA}
    assert connection.connect().pacer.limit < READ_CONCURRENCY
