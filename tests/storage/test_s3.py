"""S3 as a store: what users get wrong, and what stores lack."""

from __future__ import annotations

import socket
import time
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
from cnnray.storage import S3Store, Store, child, connection, open_store, split_uri


@pytest.mark.s3
def test_a_bucket_that_is_missing_is_named(seaweed: Any) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    for attempt in (
        lambda: store.read("key"),
        lambda: list(store.list()),
        lambda: store.list_folders(),
        lambda: store.delete("key"),
        lambda: store.open("key").read(),
    ):
        with pytest.raises(StorageError, match="no such bucket: no-such-bucket\nhint: create it"):
            attempt()


@pytest.mark.s3
def test_nothing_is_created_in_a_bucket_that_is_missing(moto_store: Store) -> None:
    # SeaweedFS, on the other hand, makes the bucket.
    with pytest.raises(StorageError, match="no such bucket: no-such-bucket"):
        open_store("s3://no-such-bucket/prefix").create("key", b"x")


@pytest.mark.s3
def test_a_wrong_secret_is_access_denied_and_is_never_shown(
    seaweed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    store = open_store(seaweed.uri("prefix"))
    for attempt in (
        lambda: store.read("key"),
        lambda: list(store.list()),
        lambda: store.create("key", b"x"),
        lambda: store.delete("key"),
        lambda: store.open("key").read(),
        lambda: store.head("key"),
    ):
        with pytest.raises(AccessDeniedError, match="access denied: s3://cnnray-tests") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)


@pytest.mark.s3
def test_an_endpoint_that_nobody_answers_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
        monkeypatch.setattr(connection, "FIRST_CONTACT_SECONDS", 1.0)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="cannot reach the object store") as caught:
            open_store("s3://bucket/prefix").read("key")
        assert time.monotonic() - started < 10
    assert "hint: check AWS_ENDPOINT_URL: " in str(caught.value)
    assert endpoint in str(caught.value)
    assert caught.value.exit_code == 4
    assert "hunter2" not in str(caught.value)


@pytest.mark.s3
def test_no_credentials_is_said_so(seaweed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match=r"no credentials for s3://cnnray-tests"):
        open_store(seaweed.uri("prefix")).read("key")


@pytest.mark.s3
def test_the_whole_bucket_can_be_a_store(seaweed: Any) -> None:
    store = open_store(f"s3://{seaweed.bucket}")
    store.write("whole/key", b"x")
    assert "whole" in store.list_folders()
    assert [item.key for item in store.list("whole/")] == ["whole/key"]


@pytest.mark.s3
def test_a_single_writer_creates_without_conditions(moto_store: S3Store) -> None:
    store = open_store(moto_store.uri, single_writer=True)
    store.create("key", b"first")
    store.create("key", b"first")
    with pytest.raises(AlreadyExistsError):
        store.create("key", b"second")
    assert store.read("key") == b"first"


def test_a_single_writer_stays_one_further_down() -> None:
    alone = open_store("s3://bucket/a", single_writer=True)
    assert child(alone, "b") == S3Store(bucket="bucket", prefix="a/b", conditional_writes=False)
    assert split_uri("s3://bucket/key", single_writer=True)[0].conditional_writes is False
    assert child(open_store("s3://bucket/a"), "b").conditional_writes is True


@pytest.mark.s3
def test_an_open_object_that_is_replaced_is_not_read_on(moto_store: S3Store) -> None:
    moto_store.write("key", b"0123456789")
    with moto_store.open("key") as file:
        assert file.read(3) == b"012"
        moto_store.write("key", b"abcdefghij")
        with pytest.raises(ChangedObjectError):
            file.read(3)


@pytest.mark.s3
def test_an_open_object_is_a_file(moto_store: S3Store) -> None:
    moto_store.write("key", b"0123456789")
    file = moto_store.open("key")
    assert (file.seek(-3, 2), file.read(), file.read(5), file.tell()) == (7, b"789", b"", 10)
    assert (file.seek(99), file.read()) == (99, b"")
    assert (file.seek(2), file.seek(3, 1), file.read(2)) == (2, 5, b"56")
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-11, 2)


@pytest.mark.s3
def test_threads_share_one_client(moto_store: S3Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: id(connection.connect()), range(8)))) == 1


@pytest.mark.s3
def test_another_environment_is_another_client(
    moto_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connection.connect()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert connection.connect() is not first


def test_an_address_that_is_none_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not-a-url")
    with pytest.raises(
        AccessDeniedError, match="cannot make an S3 client.*not-a-url\nhint: check AWS_E"
    ):
        open_store("s3://bucket/prefix").read("key")


def test_a_client_that_is_not_made_in_time_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # an environment of its own
    monkeypatch.setattr(connection, "CLIENT_SECONDS", 0.0)
    with pytest.raises(UnavailableError, match="cannot make an S3 client: TimeoutError\nhint: "):
        open_store("s3://bucket/prefix").read("key")


def test_a_password_in_the_address_is_refused_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(AccessDeniedError, match="credentials in the address .* refused") as caught:
        open_store("s3://bucket/prefix").read("key")
    assert "hunter2" not in str(caught.value)
