"""Parts: assembled from chunks in any order, published once."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.errors import AlreadyExistsError, CnnrayError
from cnnray.labeling.parts import PartAssembler, labels_exist, publish_part
from cnnray.labeling.plan import Chunk, LabelPlan, plan_labels
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import open_store


def rows(keys: list[str], *, label: str = "x") -> pa.Table:
    return pa.Table.from_pylist(
        [{"key": key, "etag": "e", "status": "ok", "label": label, "model": "m"} for key in keys],
        LABELS_SCHEMA,
    )


def rows_of(chunk: Chunk) -> pa.Table:
    return rows(chunk.entries["key"].to_pylist())


@pytest.fixture
def plan(make_entries: Callable[..., pa.Table]) -> LabelPlan:
    """25 keys in parts of 10, 10 and 5 and in chunks of 3."""
    return plan_labels(make_entries([f"k{n}" for n in range(25)]), part_rows=10, chunk_rows=3)


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_whole_and_in_order_whatever_the_order_of_the_chunks(
    plan: LabelPlan, seed: int
) -> None:
    chunks = list(plan.chunks())
    random.Random(seed).shuffle(chunks)
    assembler = PartAssembler(plan)
    parts = {}
    for chunk in chunks:
        part = assembler.add(chunk.part, chunk.number, rows_of(chunk))
        if part is not None:
            parts[chunk.part] = part
    assert assembler.num_missing == 0
    assert sorted(parts) == [0, 1, 2]
    for number, part in parts.items():
        assert part["key"].to_pylist() == plan.part(number)["key"].to_pylist()
    assert assembler.chunks == {}  # nothing is held any longer


def test_a_part_is_ready_with_its_last_chunk_and_not_before(plan: LabelPlan) -> None:
    assembler = PartAssembler(plan)
    first = [chunk for chunk in plan.chunks() if chunk.part == 0]
    for chunk in first[:-1]:
        assert assembler.add(0, chunk.number, rows_of(chunk)) is None
    assert assembler.num_missing == 3
    assert assembler.add(0, first[-1].number, rows_of(first[-1])).num_rows == 10
    assert assembler.num_missing == 2


def test_a_chunk_that_comes_again_is_dropped(plan: LabelPlan) -> None:
    assembler = PartAssembler(plan)
    chunks = [chunk for chunk in plan.chunks() if chunk.part == 2]
    assert assembler.add(2, 0, rows_of(chunks[0])) is None
    assert assembler.add(2, 0, rows(["k20", "k21", "k22"], label="other")) is None
    part = assembler.add(2, 1, rows_of(chunks[1]))
    assert part["label"].to_pylist() == ["x"] * 5
    assert assembler.add(2, 1, rows_of(chunks[1])) is None
    assert assembler.num_missing == 2


@pytest.mark.parametrize(
    "keys",
    [
        ["k20", "k21", "k99"],
        ["k21", "k20", "k22"],
        ["k20", "k20", "k22"],
        ["k20", "k21", "k22", "k22"],
    ],
)
def test_keys_that_were_not_planned_are_refused(plan: LabelPlan, keys: list[str]) -> None:
    assembler = PartAssembler(plan)
    rest = ["k23", "k24"][len(keys) - 3 :]
    assert assembler.add(2, 0, rows(keys)) is None
    with pytest.raises(CnnrayError, match="part 2 does not hold the keys"):
        assembler.add(2, 1, rows(rest))


def test_a_part_is_written_once_with_the_same_bytes_for_the_same_rows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    publish_part(store, "data/part.parquet", rows(["a", "b"]))
    first = store.read("data/part.parquet")
    publish_part(store, "data/part.parquet", rows(["a", "b"]))  # a retry
    in_chunks = pa.concat_tables([rows(["a"]), rows(["b"])])
    publish_part(store, "data/part.parquet", in_chunks)
    assert store.read("data/part.parquet") == first
    assert pq.read_table(io.BytesIO(first)).equals(rows(["a", "b"]))
    assert pq.read_schema(io.BytesIO(first)).equals(LABELS_SCHEMA)


@pytest.mark.parametrize("other", [["a"], ["b", "a"]])
def test_another_part_in_its_place_is_refused(tmp_path: Path, other: list[str]) -> None:
    store = open_store(str(tmp_path))
    publish_part(store, "data/part.parquet", rows(["a", "b"]))
    with pytest.raises(AlreadyExistsError):
        publish_part(store, "data/part.parquet", rows(other))
    assert pq.read_table(io.BytesIO(store.read("data/part.parquet"))).num_rows == 2


def test_labels_exist_when_a_part_does(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    publish_part(store, "data/run=1/part.parquet", rows(["a"]))
    assert labels_exist(store)


def test_an_output_that_is_not_there_holds_no_labels(tmp_path: Path) -> None:
    assert not labels_exist(open_store(str(tmp_path / "new")))
    store = open_store(str(tmp_path))
    store.write("other.txt", b"x")
    assert not labels_exist(store)
