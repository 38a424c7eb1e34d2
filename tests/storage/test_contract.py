"""What every store promises: reading, writing, conditional creation."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.errors import AlreadyExistsError, ChangedObjectError, MissingObjectError, StorageError
from cnnray.storage import (
    Store,
    child,
    encode_json,
    open_store,
    read_json,
    split_uri,
)

ODD_KEYS = (
    "with space.png",
    "Ünï/猫 🐈.png",
    "100%20off%.png",
    'it\'s "quoted".png',
    "a+b=c&d?e#f.png",
    "<tag>/[x]{y}.png",
    "back\\slash.png",
    "..hidden../...png",
)


def test_what_was_written_is_read_back(store: Store) -> None:
    store.write("a/b.bin", bytes(range(256)))
    assert store.read("a/b.bin") == bytes(range(256))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 3, b"012"),
        (4, 3, b"456"),
        (4, None, b"456789"),
        (8, 100, b"89"),
        (10, None, b""),
        (10, 5, b""),
        (99, 5, b""),
        (3, 0, b""),
    ],
)
def test_a_range_holds_what_there_is_of_it(
    store: Store, offset: int, length: int | None, expected: bytes
) -> None:
    store.write("digits", b"0123456789")
    assert store.read("digits", offset=offset, length=length) == expected


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.head("empty").size == 0


def test_write_replaces(store: Store) -> None:
    store.write("key", b"old")
    store.write("key", b"new")
    assert store.read("key") == b"new"


def test_what_is_not_there_is_missing(store: Store) -> None:
    store.write("there", b"x")
    with pytest.raises(MissingObjectError, match="gone"):
        store.read("gone")
    with pytest.raises(MissingObjectError, match="gone"):
        store.read("gone", offset=3, length=4)
    with pytest.raises(MissingObjectError, match="gone"):
        store.open("gone").read()
    with pytest.raises(MissingObjectError, match="under"):
        store.read("there/under")


def test_delete_removes_and_a_missing_key_is_no_error(store: Store) -> None:
    store.write("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.head("a/b") is None


def test_head_knows_the_size_and_a_new_etag_for_new_bytes(store: Store) -> None:
    store.write("key", b"old")
    before = store.head("key")
    store.write("key", b"newer")
    after = store.head("key")
    assert (before.key, before.size, after.size) == ("key", 3, 5)
    assert before.etag != after.etag


def test_head_of_nothing_and_of_a_folder_is_none(store: Store) -> None:
    store.write("folder/key", b"x")
    assert store.head("other") is None
    assert store.head("folder") is None
    assert store.head("folder/key/below") is None


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_taken_literally(
    store: Store, key: str, request: pytest.FixtureRequest
) -> None:
    if "\\" in key and "seaweed" in request.node.callspec.id:
        pytest.skip("SeaweedFS makes a slash of a backslash")
    store.create(key, key.encode())
    assert store.read(key) == key.encode()
    assert [item.key for item in store.list()] == [key]
    assert store.head(key).size == len(key.encode())
    assert store.open(key).read() == key.encode()
    with pytest.raises(AlreadyExistsError):
        store.create(key, b"other")
    store.delete(key)
    assert store.head(key) is None


def test_create_accepts_the_same_bytes_and_refuses_others(store: Store) -> None:
    store.create("key", b"first")
    store.create("key", b"first")
    with pytest.raises(AlreadyExistsError, match="key"):
        store.create("key", b"second")
    assert store.read("key") == b"first"


def test_create_respects_what_write_wrote(store: Store) -> None:
    store.write("key", b"written")
    store.create("key", b"written")
    with pytest.raises(AlreadyExistsError):
        store.create("key", b"created")


def test_of_concurrent_creators_exactly_one_wins(
    store: Store, request: pytest.FixtureRequest
) -> None:
    if "moto" in request.node.callspec.id:
        pytest.skip("moto checks, then sets, without a lock")
    barrier = threading.Barrier(8, timeout=30)

    def create(number: int) -> int | None:
        data = bytes([number]) * 50_000
        store.head("key")  # opens this thread's client
        barrier.wait()
        try:
            store.create("key", data)
        except AlreadyExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(8)) if number is not None]
    assert len(winners) == 1
    assert store.read("key") == bytes(winners) * 50_000


def test_open_seeks_and_serves_parquet(store: Store) -> None:
    table = pa.table({"n": range(1000), "text": [f"row {n}" for n in range(1000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    data = sink.getvalue().to_pybytes()
    store.write("table.parquet", data)
    with store.open("table.parquet") as file:
        assert file.seekable()
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
        parquet = pq.ParquetFile(file)
        assert parquet.read_row_group(7).equals(table.slice(700, 100))
        assert parquet.read(columns=["n"]).equals(table.select(["n"]))


def test_a_store_travels(store: Store) -> None:
    store.write("key", b"x")
    travelled = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert travelled == store
    assert travelled.read("key") == b"x"


def test_a_store_is_found_again_by_its_uri(store: Store) -> None:
    store.write("folder/key", b"x")
    assert open_store(store.uri).read("folder/key") == b"x"
    assert child(store, "folder").read("key") == b"x"
    place, key = split_uri(f"{store.uri}/folder/key")
    assert place.read(key) == b"x"


def test_json_survives(store: Store) -> None:
    value = {"b": [1, 0.1, None], "a": "Ä猫"}
    store.write("good.json", encode_json(value))
    assert read_json(store, "good.json") == value
    assert list(read_json(store, "good.json")) == ["b", "a"]


@pytest.mark.parametrize("data", [b"", b'{"a": ', b"\xff", b"[" * 200_000, b"1" * 5000])
def test_what_is_no_json_is_named(store: Store, data: bytes) -> None:
    store.write("bad.json", data)
    with pytest.raises(StorageError, match=r"bad\.json is not JSON"):
        read_json(store, "bad.json")


# Versions


@pytest.mark.parametrize("window", [{}, {"offset": 1, "length": 2}, {"offset": 2}])
def test_a_version_is_read_while_it_is_there(store: Store, window: dict[str, int]) -> None:
    store.write("key", b"0123")
    etag = store.head("key").etag
    assert store.read("key", if_match=etag, **window) == store.read("key", **window)
    store.write("key", b"01234")
    with pytest.raises(ChangedObjectError, match="key is no longer"):
        store.read("key", if_match=etag, **window)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_etag_is_no_condition(store: Store, nothing: str | None) -> None:
    store.write("key", b"x")
    assert store.read("key", if_match=nothing) == b"x"


def test_a_version_of_what_is_gone_is_missing(store: Store) -> None:
    store.write("key", b"x")
    etag = store.head("key").etag
    store.delete("key")
    with pytest.raises(MissingObjectError):
        store.read("key", if_match=etag)


def test_the_listed_etag_is_one_to_read_by(store: Store) -> None:
    store.write("key", b"x")
    (item,) = store.list()
    assert store.read("key", if_match=item.etag) == b"x"


def test_a_large_object_is_read_whole(store: Store) -> None:
    data = bytes(range(256)) * 4 * 20_000  # 20 MB: SeaweedFS keeps it in pieces
    store.write("large", data)
    assert store.read("large", if_match=store.head("large").etag) == data


def test_a_store_that_refuses_to_overwrite_is_known(store: Store) -> None:
    assert store.refuses_overwrite("probe")
    assert store.refuses_overwrite("probe")
