"""A packed dataset as the input of labelling."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnnray.datasets.manifest import MANIFEST
from cnnray.datasets.packing import build_manifest, plan_pack
from cnnray.datasets.shards import pack_shard
from cnnray.datasets.sources import open_source
from cnnray.datasets.sources.dataset import DatasetSource
from cnnray.errors import ChangedObjectError, DataError, MissingObjectError, StorageError
from cnnray.options import DecodeLimits
from cnnray.storage import Store, open_store

COUNT = 200


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path, entries_of: Callable[..., Any]) -> Store:
    """200 images of which each knows its number, in row groups of 64."""
    for number in range(COUNT):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    source = open_source(str(tmp_path / "photos"))
    packing = plan_pack(entries_of(source), val=0.2, test=0.0, shard_bytes=8_000)
    output = open_store(str(tmp_path / "dataset"))
    packed = [
        pack_shard(
            shard, source=source, store=output, classes=packing.classes, limits=DecodeLimits()
        )
        for shard in packing.shards
    ]
    manifest, _ = build_manifest(packing, packed, source={})
    output.create(MANIFEST, manifest.to_bytes())
    return output


def number_of(key: str) -> int:
    return int(key.split("/")[1].removesuffix(".png"))


def test_it_is_opened_for_what_it_is(store: Store) -> None:
    assert open_source(store.uri, format="dataset", labelled=False) == DatasetSource(store)
    assert open_source(store.uri, labelled=False) == DatasetSource(store)


def test_every_sample_of_every_split_is_listed_once(
    store: Store, rows_of: Callable[..., Any]
) -> None:
    rows = rows_of(DatasetSource(store))
    assert sorted(number_of(row["key"]) for row in rows) == list(range(COUNT))
    assert {row["split"] for row in rows} == {"train", "val"}
    assert all(row["path"].startswith(row["split"] + "/shard-") for row in rows)
    assert all(row["etag"] for row in rows)


def test_the_bytes_are_those_of_the_key(
    store: Store, entries_of: Callable[..., Any], travelled: Callable[..., Any]
) -> None:
    source = travelled(DatasetSource(store))
    entries = entries_of(source)
    data = list(source.read(entries))
    expected = [png(number_of(key)) for key in entries["key"].to_pylist()]
    assert data == expected


def test_any_order_of_entries_is_read(store: Store, entries_of: Callable[..., Any]) -> None:
    source = DatasetSource(store)
    entries = entries_of(source)
    order = [7, 3, 190, 64, 63, 0, 199, 7]
    some = entries.take(order)
    expected = [png(number_of(key)) for key in some["key"].to_pylist()]
    assert list(source.read(some)) == expected


def test_a_shard_that_is_gone_gives_each_of_its_entries_its_error(
    store: Store, entries_of: Callable[..., Any]
) -> None:
    source = DatasetSource(store)
    entries = entries_of(source)
    gone = entries["path"][0].as_py()
    store.delete(gone)
    results = list(source.read(entries))
    for path, result in zip(entries["path"].to_pylist(), results, strict=True):
        assert isinstance(result, MissingObjectError if path == gone else bytes)


def test_a_damaged_shard_gives_each_of_its_entries_its_error(
    store: Store, entries_of: Callable[..., Any]
) -> None:
    source = DatasetSource(store)
    entries = entries_of(source)
    bad = entries["path"][0].as_py()
    data = bytearray(store.read(bad))
    data[4:2000] = bytes(1996)
    store.write(bad, bytes(data))
    results = list(source.read(entries))
    for path, result in zip(entries["path"].to_pylist(), results, strict=True):
        assert isinstance(result, StorageError if path == bad else bytes)


def test_a_row_beyond_the_shard_is_an_error_in_its_place(
    store: Store, entries_of: Callable[..., Any]
) -> None:
    source = DatasetSource(store)
    entries = entries_of(source).slice(0, 2)
    position = entries.schema.get_field_index("offset")
    entries = entries.set_column(position, entries.schema.field("offset"), [[10_000, 1]])
    first, second = source.read(entries)
    assert isinstance(first, ChangedObjectError)
    assert isinstance(second, bytes)


def test_rows_of_a_shard_that_was_replaced_have_changed(
    store: Store, entries_of: Callable[..., Any]
) -> None:
    source = DatasetSource(store)
    entries = entries_of(source)
    shard = entries["path"][0].as_py()
    rows = pq.read_table(store.open(shard))
    sink = pa.BufferOutputStream()
    pq.write_table(rows.take([1, 0, *range(2, rows.num_rows)]), sink)
    store.write(shard, sink.getvalue().to_pybytes())
    first, second, third = source.read(entries.slice(0, 3))
    assert isinstance(first, ChangedObjectError)
    assert isinstance(second, ChangedObjectError)
    assert third == rows["image"][2].as_py()


def test_listing_a_damaged_shard_is_an_error_of_the_data(store: Store) -> None:
    source = DatasetSource(store)
    shard = source.partitions()[0]
    store.write(shard, store.read(shard)[:100])
    with pytest.raises(DataError, match="is damaged"):
        list(source.list(shard))


def test_without_a_manifest_there_is_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset at"):
        DatasetSource(open_store(str(tmp_path))).partitions()
