"""Listing a whole source with a few threads: the order, the bound, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import open_source
from cnnray.errors import DataError, UnavailableError
from cnnray.schema import ENTRY_SCHEMA


def table_of(key: str) -> pa.Table:
    row = {"key": key, "path": key, "offset": 0, "length": 1, "etag": "e"}
    return pa.Table.from_pylist([row], ENTRY_SCHEMA)


@dataclass
class Toy:
    """``tables`` of one row in each partition; ``produced`` counts them all."""

    tables: dict[str, int]
    slow: str = ""
    broken: str = ""
    produced: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def partitions(self) -> list[str]:
        return [*self.tables]

    def list(self, partition: str) -> Iterator[pa.Table]:
        try:
            for number in range(self.tables[partition]):
                time.sleep(0.05 if partition == self.slow else 0)
                self.produced.append(f"{partition}{number}")
                yield table_of(f"{partition}{number}")
            if partition == self.broken:
                raise UnavailableError(f"{partition} does not answer")
        finally:
            self.closed.append(partition)

    @property
    def keys(self) -> list[str]:
        return [f"{name}{number}" for name, count in self.tables.items() for number in range(count)]


def keys_of(tables: Iterator[pa.Table]) -> list[str]:
    return [key for table in tables for key in table["key"].to_pylist()]


def list_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("list")]


@pytest.mark.parametrize("concurrency", [1, 2, 8])
@pytest.mark.parametrize("slow", ["a", "f", "z"])
def test_order_is_the_source_s_whoever_is_slow(concurrency, slow):
    source = Toy(dict(zip("abcdefghij", range(10), strict=True)) | {"z": 3}, slow=slow)
    assert keys_of(list_in_order(source, concurrency=concurrency)) == source.keys


def test_partitions_are_listed_at_the_same_time():
    together = threading.Barrier(4, timeout=10)

    class Meeting(Toy):
        def list(self, partition: str) -> Iterator[pa.Table]:
            together.wait()
            return super().list(partition)

    source = Meeting(dict.fromkeys("abcd", 1))
    assert keys_of(list_in_order(source, concurrency=4)) == source.keys


@pytest.mark.parametrize(
    ("tables", "bound"),
    [
        ({"a": 10_000, "b": 10_000, "c": 10_000}, 1 + 2 * 3),  # long partitions
        ({"a": 1} | {f"p{number}": 1 for number in range(10_000)}, 1 + 4),  # many of them
    ],
)
def test_no_more_is_listed_ahead_than_a_table_or_two_of_a_few_partitions(tables, bound):
    source = Toy(tables)
    listing = list_in_order(source, concurrency=2)
    next(listing)
    time.sleep(0.3)
    assert 1 < len(source.produced) <= bound
    listing.close()


def test_an_error_comes_after_what_precedes_it_and_ends_the_threads():
    source = Toy({"a": 3, "b": 2, "c": 1000, "d": 1000}, slow="a", broken="b")
    listing = list_in_order(source, concurrency=3)
    keys = [next(listing)["key"][0].as_py() for _ in range(5)]
    assert keys == ["a0", "a1", "a2", "b0", "b1"]
    with pytest.raises(UnavailableError, match="b does not answer"):
        next(listing)
    assert list_threads() == []
    assert sorted(source.closed) == ["a", "b", "c", "d"]


def test_a_consumer_that_stops_ends_the_threads():
    source = Toy(dict.fromkeys("abcdefgh", 1000))
    for _ in list_in_order(source, concurrency=4):
        break
    assert list_threads() == []
    assert len(source.produced) < 20


def test_the_threads_end_with_the_listing():
    assert keys_of(list_in_order(Toy({"a": 2}))) == ["a0", "a1"]
    assert list_threads() == []


def test_no_partition_or_none_with_a_table_is_an_empty_listing():
    assert list(list_in_order(Toy({}))) == []
    assert list(list_in_order(Toy(dict.fromkeys("abc", 0)), concurrency=1)) == []


def test_a_source_without_partitions_says_so(tmp_path):
    (tmp_path / "a.csv").write_text("path\n")
    source = open_source(str(tmp_path), format="table")
    with pytest.raises(DataError, match=r"no \.parquet files"):
        next(list_in_order(source))
    assert list_threads() == []


def test_a_folder_is_listed_as_its_partitions_one_by_one(tmp_path, entries_of):
    for number in range(200):
        path = tmp_path / f"class {number % 20}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert pa.concat_tables(list_in_order(source)).equals(entries_of(source))
