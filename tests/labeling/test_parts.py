"""A part: written once, by whoever comes first, and known again by its footer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from cnnray.errors import ConflictError
from cnnray.labeling.parts import (
    FOOTER_KEY,
    PartFooter,
    PublishedPart,
    decode_part,
    write_part,
)
from cnnray.schema import LABELS_SCHEMA, labels_schema
from cnnray.storage import Store, sha256

Inputs = Callable[..., pa.Table]
LabelRows = Callable[..., pa.Table]

KEY = "data/run=1/part-00000-of-00001.parquet"


@pytest.fixture
def rows(inputs: Inputs, label_rows: LabelRows) -> pa.Table:
    """Three label rows, one of them an error."""
    return label_rows(inputs("a", "b", "c"), bad=["b"])


def publish(store: Store, rows: pa.Table, *, run: str = "1", part: int = 0) -> PublishedPart | None:
    return write_part(store, KEY, rows, run=run, part=part)


def read_rows(store: Store) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(KEY)))


def parquet(rows: pa.Table, footer: Any = None) -> bytes:
    """A Parquet file as anybody may write it, with what a footer of ours would say."""
    if footer is not None:
        text = footer if isinstance(footer, bytes) else json.dumps(footer).encode()
        rows = rows.replace_schema_metadata({FOOTER_KEY: text})
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    return buffer.getvalue()


def test_a_part_is_plain_parquet_with_the_rows_as_they_were(store: Store, rows: pa.Table) -> None:
    publish(store, rows)
    assert read_rows(store).equals(rows)
    assert read_rows(store).schema.equals(LABELS_SCHEMA)


def test_rows_in_several_pieces_are_one_part(store: Store, rows: pa.Table) -> None:
    publish(store, pa.concat_tables([rows.slice(0, 1), rows.slice(1)]))
    assert read_rows(store).equals(rows)


def test_embeddings_survive(store: Store, rows: pa.Table) -> None:
    schema = labels_schema(embeddings=True)
    vectors = pa.array([[0.5, -1.5], None, []], pa.list_(pa.float16()))
    position = schema.get_field_index("embedding")
    publish(store, rows.add_column(position, schema.field("embedding"), vectors))
    assert read_rows(store)["embedding"].to_pylist() == [[0.5, -1.5], None, []]


def test_who_publishes_gets_the_footer_and_the_digest(store: Store, rows: pa.Table) -> None:
    published = publish(store, rows, run="7", part=3)
    footer = PartFooter(run="7", part=3, rows=3, ok=2)
    assert published == PublishedPart(footer, sha256(store.read(KEY)))
    assert decode_part(store.read(KEY), run="7", part=3)[0] == footer


def test_of_two_drivers_the_first_one_counts(
    store: Store, rows: pa.Table, inputs: Inputs, label_rows: LabelRows
) -> None:
    publish(store, rows)
    first = store.read(KEY)
    assert publish(store, label_rows(inputs("a", "b", "c"), label="dog")) is None
    assert store.read(KEY) == first


def test_a_part_that_was_written_before_the_reply_was_lost_is_ours(
    store: Store, rows: pa.Table
) -> None:
    assert publish(store, rows) == publish(store, rows) is not None


def test_of_many_drivers_at_once_one_has_published(
    store: Store, inputs: Inputs, label_rows: LabelRows, at_once: Callable[..., list[Any]]
) -> None:
    tables = [label_rows(inputs("a", "b"), label=name) for name in "wxyz"]
    results = at_once(*(lambda rows=rows: publish(store, rows) for rows in tables))
    [(winner, published)] = [(n, part) for n, part in enumerate(results) if part is not None]
    assert published.digest == sha256(store.read(KEY))
    assert read_rows(store).equals(tables[winner])


# What else may have the name of a part


def test_a_text_file_in_its_place_is_refused_and_stays(store: Store, rows: pa.Table) -> None:
    store.write(KEY, b"hello, world")
    with pytest.raises(ConflictError, match=f"{KEY} is not a part of a table of labels"):
        publish(store, rows)
    assert store.read(KEY) == b"hello, world"


def test_an_empty_file_in_its_place_is_refused(store: Store, rows: pa.Table) -> None:
    store.write(KEY, b"")
    with pytest.raises(ConflictError, match="is not a part of a table of labels"):
        publish(store, rows)


def test_foreign_parquet_in_its_place_is_refused(store: Store, rows: pa.Table) -> None:
    store.write(KEY, parquet(rows))
    with pytest.raises(ConflictError, match="is not a part of a table of labels"):
        publish(store, rows)


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_half_a_part_in_its_place_is_refused(store: Store, rows: pa.Table, cut: int) -> None:
    publish(store, rows)
    store.write(KEY, store.read(KEY)[:-cut])
    with pytest.raises(ConflictError, match="is not a part of a table of labels"):
        publish(store, rows)


@pytest.mark.parametrize(("run", "part"), [("2", 0), ("1", 1)])
def test_another_run_or_part_in_its_place_is_refused(
    store: Store, rows: pa.Table, run: str, part: int
) -> None:
    publish(store, rows, run=run, part=part)
    with pytest.raises(ConflictError, match=f"{KEY} is part {part} of run {run}"):
        publish(store, rows)


# Sealed parts


def test_a_sealed_part_has_columns_and_no_rows(store: Store) -> None:
    published = publish(store, LABELS_SCHEMA.empty_table())
    assert published is not None
    assert published.footer == PartFooter(run="1", part=0, rows=0, ok=0)
    assert read_rows(store).equals(LABELS_SCHEMA.empty_table())


def test_a_driver_that_wakes_up_finds_its_part_sealed(store: Store, rows: pa.Table) -> None:
    publish(store, LABELS_SCHEMA.empty_table())
    assert publish(store, rows) is None
    assert read_rows(store).num_rows == 0


def test_a_plain_reader_reads_over_a_sealed_part(store: Store, rows: pa.Table) -> None:
    nothing = LABELS_SCHEMA.empty_table()
    write_part(store, "data/run=1/part-00000-of-00002.parquet", nothing, run="1", part=0)
    write_part(store, "data/run=1/part-00001-of-00002.parquet", rows, run="1", part=1)
    found = pyarrow.dataset.dataset(f"{store.uri}/data", partitioning="hive").to_table()
    assert found.select(LABELS_SCHEMA.names).to_pylist() == rows.to_pylist()


# Reading


def test_what_is_read_of_a_part_are_its_footer_and_the_columns_to_check(rows: pa.Table) -> None:
    footer = {"run": "1", "part": 0, "rows": 3, "ok": 2}
    there, found = decode_part(parquet(rows, footer), run="1", part=0)
    assert there == PartFooter(**footer)
    assert found.equals(rows.select(["key", "etag", "status"]))


def assert_no_part(data: bytes) -> None:
    with pytest.raises(ValueError, match="is not a part of a table of labels, or damaged"):
        decode_part(data, run="1", part=0)


def test_a_file_that_is_no_parquet_is_no_part() -> None:
    assert_no_part(b"PAR1 and so on")


@pytest.mark.parametrize(
    "footer",
    [
        b"{",
        b"\xff",
        b"[" * 200_000,
        [],
        7,
        None,
        {},
        {"run": "1", "part": 0, "rows": 3},
        {"run": "1", "part": 0, "rows": 3, "ok": 2, "more": 1},
        {"run": "1", "part": 0, "rows": 2, "ok": 2},
        {"run": "1", "part": 0, "rows": "3", "ok": 2},
        {"run": "1", "part": 0, "rows": 3, "ok": 3},
        {"run": "1", "part": 0, "rows": 3, "ok": None},
    ],
    ids=lambda footer: str(footer)[:60],
)
def test_a_footer_that_does_not_say_what_is_there_is_none(rows: pa.Table, footer: Any) -> None:
    assert_no_part(parquet(rows, footer))


@pytest.mark.parametrize("name", ["key", "etag", "status"])
def test_a_part_without_a_column_or_with_another_type_is_none(rows: pa.Table, name: str) -> None:
    footer = {"run": "1", "part": 0, "rows": 3, "ok": 2}
    assert_no_part(parquet(rows.drop_columns([name]), footer))
    numbers = pa.array([1, 2, 3])
    assert_no_part(parquet(rows.set_column(rows.column_names.index(name), name, numbers), footer))


@pytest.mark.parametrize("there", [{"run": "2"}, {"part": 1}, {"run": None}, {"part": "0"}])
def test_another_part_is_named(rows: pa.Table, there: dict[str, Any]) -> None:
    footer = {"run": "1", "part": 0, "rows": 3, "ok": 2} | there
    with pytest.raises(ValueError, match=f"is part {footer['part']} of run {footer['run']}"):
        decode_part(parquet(rows, footer), run="1", part=0)
