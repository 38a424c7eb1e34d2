"""The plan of a labelling run: every key once, cut into parts and chunks."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from cnnray.labeling.plan import plan_labels

MakeEntries = Callable[..., pa.Table]


@pytest.mark.parametrize(("part_rows", "chunk_rows"), [(10, 3), (7, 7), (4, 100), (1, 1), (99, 5)])
def test_every_key_is_in_one_chunk_of_one_part(
    make_entries: MakeEntries, part_rows: int, chunk_rows: int
) -> None:
    keys = [f"k{n}" for n in range(25)]
    plan = plan_labels(make_entries(keys), part_rows=part_rows, chunk_rows=chunk_rows)
    chunks = list(plan.chunks())
    assert [key for chunk in chunks for key in chunk.entries["key"].to_pylist()] == keys
    assert all(1 <= chunk.entries.num_rows <= chunk_rows for chunk in chunks)
    assert {chunk.part for chunk in chunks} == set(range(plan.num_parts))
    for number in range(plan.num_parts):
        part = [chunk for chunk in chunks if chunk.part == number]
        assert [chunk.number for chunk in part] == list(range(len(part)))
        assert pa.concat_tables([chunk.entries for chunk in part]).equals(plan.part(number))
        assert plan.part(number).num_rows <= part_rows


def test_a_key_that_is_listed_twice_is_labelled_once_and_counted(
    make_entries: MakeEntries,
) -> None:
    plan = plan_labels(make_entries(["a", "b", "a", "c", "b", "a"]), part_rows=10, chunk_rows=10)
    assert plan.entries["key"].to_pylist() == ["a", "b", "c"]
    assert plan.entries["path"].to_pylist() == ["0", "1", "3"]  # the first one counts
    assert plan.duplicates == 3


def test_nothing_to_label_is_no_part(make_entries: MakeEntries) -> None:
    plan = plan_labels(make_entries([]), part_rows=10, chunk_rows=10)
    assert (plan.num_parts, list(plan.chunks()), plan.duplicates) == (0, [], 0)


def test_parts_are_named_by_number_and_count(make_entries: MakeEntries) -> None:
    plan = plan_labels(make_entries([f"{n}" for n in range(25)]), part_rows=10, chunk_rows=3)
    assert plan.num_parts == 3
    assert plan.part_name(2) == "part-00002-of-00003.parquet"


def test_the_digest_is_that_of_the_work(make_entries: MakeEntries) -> None:
    def digest(
        keys: list[str], *, etag: str = "e", part_rows: int = 10, chunk_rows: int = 3
    ) -> str:
        return plan_labels(
            make_entries(keys, etag), part_rows=part_rows, chunk_rows=chunk_rows
        ).digest

    assert digest(["a", "b"]) == digest(["a", "b"]) == digest(["a", "b", "a"])
    different = {
        digest(["a", "b"]),
        digest(["b", "a"]),
        digest(["ab"]),
        digest(["a", "b"], etag="f"),
        digest(["a", "b"], part_rows=9),
        digest(["a", "b"], chunk_rows=4),
        digest([]),
    }
    assert len(different) == 7
