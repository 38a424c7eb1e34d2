"""Reading many images of a source at a time: what is a fact about one image, and what is not."""

import threading
from dataclasses import dataclass

import pyarrow as pa
import pytest

from cnnray.datasets.sources.base import READ_TOGETHER, read_each
from cnnray.datasets.sources.dataset import DatasetSource
from cnnray.datasets.sources.folder import FolderSource
from cnnray.datasets.sources.idx import IdxSource
from cnnray.errors import (
    AccessDeniedError,
    ChangedObjectError,
    MissingObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import READ_CONCURRENCY, connection, open_store


@pytest.mark.parametrize("kind", [MissingObjectError, ChangedObjectError, StorageError])
def test_an_error_of_one_image_takes_its_place(kind):
    def read(number: int) -> bytes:
        if number == 50:
            raise kind("image 50")
        return b"%d" % number

    results = list(read_each(read, range(100)))
    assert type(results[50]) is kind
    assert [int(data) for data in results if isinstance(data, bytes)] == [
        number for number in range(100) if number != 50
    ]


@pytest.mark.parametrize("kind", [UnavailableError, AccessDeniedError])
def test_a_failure_of_the_store_is_raised_in_its_place(kind):
    def read(number: int) -> bytes:
        if number == 50:
            raise kind("the bucket")
        return b"%d" % number

    results = read_each(read, range(100))
    assert [next(results) for _ in range(50)] == [b"%d" % number for number in range(50)]
    with pytest.raises(kind, match="the bucket"):
        next(results)


def test_after_a_failure_what_has_not_begun_is_not_read():
    failed = threading.Event()
    begun = []

    def read(number: int) -> bytes:
        begun.append(number)
        if number == 0:
            raise UnavailableError("the bucket")
        assert failed.wait(10)
        return b""

    with pytest.raises(UnavailableError):
        next(read_each(read, range(100)))
    failed.set()
    assert list(read_each(lambda _: b"x", range(20))) == [b"x"] * 20  # the readers are free again
    assert len(begun) <= READ_CONCURRENCY + 1


def test_no_more_is_read_ahead_than_twice_the_readers():
    asked = []
    results = read_each(lambda number: b"%d" % number, (asked.append(n) or n for n in range(1000)))
    next(results)
    assert len(asked) == 2 * READ_CONCURRENCY * READ_TOGETHER
    results.close()


@dataclass(frozen=True)
class FailingStore:
    """A store of which nothing can be had."""

    error: StorageError
    uri: str = "s3://failing"

    def head(self, key):
        raise self.error

    def open(self, key):
        raise self.error


@pytest.mark.parametrize("kind", [UnavailableError, AccessDeniedError])
@pytest.mark.parametrize("source", [DatasetSource, IdxSource])
def test_sources_that_read_whole_files_raise_a_failure_of_the_store(source, kind):
    row = {"key": "k", "path": "file", "offset": 0, "length": 1, "etag": "e"}
    entries = pa.Table.from_pylist([row], ENTRY_SCHEMA)
    with pytest.raises(kind, match="the bucket"):
        next(source(store=FailingStore(kind("the bucket"))).read(entries))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, UnavailableError),  # nobody listens
        ({"AWS_ENDPOINT_URL": "not-a-url"}, AccessDeniedError),
        ({"AWS_PROFILE": "no-such-profile"}, AccessDeniedError),
        ({"AWS_SECRET_ACCESS_KEY": ""}, AccessDeniedError),
    ],
)
def test_a_worker_that_never_reaches_the_store_blames_no_image(monkeypatch, environment, kind):
    known = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in (known | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connection, "FIRST_CONTACT_SECONDS", 0.2)
    row = {"key": "k", "path": "k.png", "offset": 0, "length": -1, "etag": "e"}
    entries = pa.Table.from_pylist([row], ENTRY_SCHEMA)
    with pytest.raises(kind):
        list(FolderSource(store=open_store("s3://bucket/photos")).read(entries))
