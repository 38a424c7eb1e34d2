"""The fast reader against a store that fails: what it leaves to the client that names faults."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from cnnray.errors import ChangedObjectError, MissingObjectError, UnavailableError
from cnnray.storage import READ_CONCURRENCY, Store, connection, fast_read, retry
from cnnray.storage.replies import Fault
from cnnray.storage.retry import Deadline

pytestmark = pytest.mark.timeout(60)

DATA = bytes(range(256)) * 40

ODD_KEYS = (
    "with space.png",
    "Ünï/猫 🐈.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "100%20off%2F%.png",
    "%2e%2e/%2e.png",
    "a+b=c&d?e#f;g:h@i!j$k*l(m),n~o^p`q|r.png",
    'it\'s "quoted" <tag>/[x]{y}.png',
    "back\\slash.png",
    "..hidden../...png",
    "_run=7/.dot",
    "long/" + "é" * 450,
)

IMPOSTORS = {
    # key: what becomes of it by the rules of paths
    "a/../b.png": "b.png",
    "./a.png": "a.png",
    "a/./b.png": "a/b.png",
    "a//b.png": "a/b.png",
    "folder/": "folder",
    "/rooted.png": "rooted.png",
    "..": "",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits, and a connection that has learned nothing of the store yet."""
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(retry, "MAX_DELAY_SECONDS", 0.05)
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 20.0)
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.8)
    monkeypatch.setattr(connection, "_connections", {})


def gets(chaos: Any) -> list[Any]:
    return chaos.operations(operation="GetObject")


def read_fast(
    store: Any,
    key: str,
    *,
    offset: int = 0,
    length: int | None = None,
    if_match: str | None = None,
) -> bytes | Fault | None:
    """One try of the fast reader alone."""
    return connection.connect().read_fast(
        bucket=store.bucket,
        key=key,
        deadline=Deadline(),
        offset=offset,
        length=length,
        if_match=if_match,
    )


# What it reads


@pytest.mark.parametrize("window", [{}, {"offset": 3}, {"offset": 3, "length": 5}, {"length": 9}])
def test_a_store_reads_by_the_fast_reader(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch, window: dict[str, int]
) -> None:
    chaos_store.write("folder/key", DATA)
    etag = chaos_store.head("folder/key").etag

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the slow way is taken")

    monkeypatch.setattr(connection.Connection, "request", refuse)
    expected = DATA[window.get("offset", 0) :][: window.get("length")]
    assert chaos_store.read("folder/key", **window) == expected
    assert chaos_store.read("folder/key", if_match=etag, **window) == expected
    assert [item.condition for item in gets(chaos)] == ["", f'if-match: "{etag}"']


def test_what_reaches_beyond_the_end_is_read_as_far_as_it_goes(chaos_store: Store) -> None:
    chaos_store.write("digits", b"0123456789")
    assert read_fast(chaos_store, "digits", offset=8, length=100) == b"89"
    assert chaos_store.read("digits", offset=10) == b""
    assert chaos_store.read("digits", offset=99, length=5) == b""


def test_an_empty_object_is_read(chaos_store: Store) -> None:
    chaos_store.write("empty", b"")
    assert read_fast(chaos_store, "empty") == b""


@pytest.mark.parametrize("key", ODD_KEYS)
def test_an_odd_key_is_asked_for_byte_for_byte(chaos: Any, chaos_store: Store, key: str) -> None:
    chaos_store.write(key, key.encode())
    assert read_fast(chaos_store, key) == key.encode()
    assert [item.key for item in gets(chaos)] == [key]


@pytest.mark.parametrize("key", IMPOSTORS)
def test_a_key_that_is_no_path_is_not_mistaken_for_another(chaos_store: Store, key: str) -> None:
    chaos_store.write(key, b"right")
    if IMPOSTORS[key]:
        chaos_store.write(IMPOSTORS[key], b"wrong")
    assert read_fast(chaos_store, key) is None
    assert chaos_store.read(key) == b"right"


@pytest.mark.parametrize("key", ["two\nlines.png", "tab\tbed.png", "bell\x01.png", "del\x7f.png"])
def test_a_key_with_control_characters_is_left_alone(
    chaos: Any, chaos_store: Store, key: str
) -> None:
    chaos_store.write(key, b"x")
    assert read_fast(chaos_store, key) is None
    assert gets(chaos) == []
    assert chaos_store.read(key) == b"x"


def test_a_large_object_is_left_to_the_client_that_has_more_time(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_read, "MAX_BYTES", len(DATA) - 1)
    chaos_store.write("key", DATA)
    assert read_fast(chaos_store, "key", length=len(DATA)) is None
    assert gets(chaos) == []
    for _ in range(2 * fast_read.MAX_FAILURES):
        assert chaos_store.read("key") == DATA
    assert read_fast(chaos_store, "key", length=10) == DATA[:10]  # no failure was counted


# What it leaves


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        ("503", Fault.THROTTLED),
        ("429", Fault.THROTTLED),
        ("500", Fault.TRANSIENT),
        ("409", Fault.TRANSIENT),
        ("reset", Fault.TRANSIENT),
        ("lost_reply", Fault.TRANSIENT),
        ("truncate", Fault.TRANSIENT),
        ("stall", Fault.TRANSIENT),
        ("no_headers", Fault.TRANSIENT),
        ("flip", Fault.DAMAGED),
        ("access_denied", None),
        ("412", None),
    ],
)
def test_a_failure_is_one_request_and_never_bytes(
    chaos: Any, chaos_store: Store, action: str, fault: Fault | None
) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET"})
    started = time.monotonic()
    assert read_fast(chaos_store, "key") is fault
    assert time.monotonic() - started < 2 * connection.SILENCE_SECONDS
    assert len(gets(chaos)) == 1


@pytest.mark.parametrize(
    "action", ["503", "500", "reset", "truncate", "stall", "no_headers", "flip"]
)
def test_what_failed_once_is_read_by_the_next_request(
    chaos: Any, chaos_store: Store, action: str
) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": action, "method": "GET", "times": 1})
    assert chaos_store.read("key") == DATA
    assert len(gets(chaos)) == 2


def test_a_body_that_drips_ends_with_the_try(chaos: Any, chaos_store: Store) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "drip", "method": "GET", "bytes_per_second": 50.0})
    started = time.monotonic()
    assert read_fast(chaos_store, "key") is Fault.TRANSIENT
    assert time.monotonic() - started < 2 * connection.SILENCE_SECONDS


def test_a_version_that_is_gone_is_changed_and_a_missing_key_is_missing(
    chaos: Any, chaos_store: Store
) -> None:
    chaos_store.write("key", DATA)
    etag = chaos_store.head("key").etag
    chaos_store.write("key", DATA[::-1])
    with pytest.raises(ChangedObjectError):
        chaos_store.read("key", if_match=etag)
    with pytest.raises(MissingObjectError):
        chaos_store.read("gone", if_match=etag)
    assert len(gets(chaos)) == 4  # each once more, by the client that says what it is


def test_a_throttled_try_lowers_the_pace(chaos: Any, chaos_store: Store) -> None:
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "503", "method": "GET", "times": 1})
    assert chaos_store.read("key") == DATA
    assert connection.connect().pacer.limit == READ_CONCURRENCY // 2


def test_no_try_is_made_without_a_place_among_the_requests_in_flight(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos_store.write("key", DATA)
    monkeypatch.setattr(retry, "OBJECT_SECONDS", 1.0)
    with contextlib.ExitStack() as stack:
        for _ in range(READ_CONCURRENCY):
            stack.enter_context(connection.connect().pacer.slot(1))
        with pytest.raises(UnavailableError):
            chaos_store.read("key")
    assert gets(chaos) == []


def test_no_try_is_made_that_may_outlast_the_deadline(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos_store.write("key", DATA)
    monkeypatch.setattr(retry, "OBJECT_SECONDS", connection.SILENCE_SECONDS / 2)
    assert read_fast(chaos_store, "key") is None
    assert gets(chaos) == []


# How long it goes on


def test_failures_in_a_row_give_the_fast_reader_a_pause(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_read, "PAUSE_SECONDS", 1.0)
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "500", "method": "GET", "times": fast_read.MAX_FAILURES})
    for _ in range(fast_read.MAX_FAILURES):
        assert read_fast(chaos_store, "key") is Fault.TRANSIENT
    assert read_fast(chaos_store, "key") is None
    assert chaos_store.read("key") == DATA
    assert len(gets(chaos)) == fast_read.MAX_FAILURES + 1
    time.sleep(1.0)
    assert read_fast(chaos_store, "key") == DATA


def test_after_a_pause_one_more_failure_is_enough_for_another(
    chaos: Any, chaos_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_read, "PAUSE_SECONDS", 0.2)
    chaos_store.write("key", DATA)
    chaos.server.set_rules({"action": "500", "method": "GET"})
    for _ in range(fast_read.MAX_FAILURES):
        read_fast(chaos_store, "key")
    time.sleep(0.2)
    assert read_fast(chaos_store, "key") is Fault.TRANSIENT
    assert read_fast(chaos_store, "key") is None


def test_a_success_ends_a_row_of_failures(chaos: Any, chaos_store: Store) -> None:
    chaos_store.write("key", DATA)
    for _ in range(3):
        chaos.server.set_rules(
            {"action": "500", "method": "GET", "times": fast_read.MAX_FAILURES - 1}
        )
        for _ in range(fast_read.MAX_FAILURES - 1):
            assert read_fast(chaos_store, "key") is Fault.TRANSIENT
        assert read_fast(chaos_store, "key") == DATA
