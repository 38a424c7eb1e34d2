"""Assembling: whole parts in the order of the plan, whatever comes when and how often."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnray.errors import CnnrayError
from cnnray.labeling.assembler import PartAssembler

Place = tuple[int, int]
"""A part and a row of it."""

PARTS = {0: 4, 1: 4, 5: 3}
PLACES = [(part, row) for part, count in PARTS.items() for row in range(count)]


def planned(part: int) -> pa.Table:
    """The inputs of a part: keys are not in the order of the alphabet."""
    keys = [f"k{part}-{9 - row}" for row in range(PARTS[part])]
    return pa.table({"key": keys, "path": keys, "etag": [f"e{row}" for row in range(PARTS[part])]})


def block(places: Sequence[Place], *, label: str = "cat") -> pa.Table:
    """Label rows of some places, as a worker returns them."""
    inputs = {part: planned(part).to_pylist() for part in PARTS}
    rows = [
        {
            "key": inputs[part][row]["key"],
            "etag": inputs[part][row]["etag"],
            "label": label,
            "top_k": [{"label": label, "probability": 0.5}],
            "part": part,
            "row": row,
        }
        for part, row in places
    ]
    top_k = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))
    schema = pa.schema(
        [("key", pa.string()), ("etag", pa.string()), ("label", pa.string()), ("top_k", top_k)]
        + [("part", pa.int32()), ("row", pa.int32())]
    )
    return pa.Table.from_pylist(rows, schema)


def assembler(*parts: int, held_rows: int = 1000) -> PartAssembler:
    """An assembler that expects some parts, or all."""
    made = PartAssembler(held_rows=held_rows)
    for part in parts or PARTS:
        made.expect(part, planned(part))
    return made


def add(into: PartAssembler, rows: pa.Table) -> dict[int, pa.Table]:
    """The parts that these rows complete, each of them once."""
    pairs = list(into.add(rows))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_whole(parts: dict[int, pa.Table], numbers: Sequence[int]) -> None:
    assert sorted(parts) == sorted(numbers)
    for number, rows in parts.items():
        expected = block([(number, row) for row in range(PARTS[number])])
        assert rows.equals(expected.drop_columns(["part", "row"]))


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.sampled_from(PLACES), max_size=8).flatmap(
        lambda again: st.permutations([*PLACES, *again])
    ),
    size=st.integers(1, 20),
    held_rows=st.sampled_from([0, 1, 3, 1000]),
)
def test_parts_are_whole_whatever_the_order_the_blocks_and_the_repeats(
    places: list[Place], size: int, held_rows: int
) -> None:
    with closing(assembler(held_rows=held_rows)) as collecting:
        parts: dict[int, pa.Table] = {}
        for start in range(0, len(places), size):
            ready = add(collecting, block(places[start : start + size]))
            assert not ready.keys() & parts.keys()
            parts |= ready
            assert sum(part.held_rows for part in collecting.parts.values()) <= held_rows
        assert_whole(parts, list(PARTS))
        assert collecting.taken == len(PLACES)
        assert collecting.parts == {}


def test_a_part_is_ready_with_its_last_row_and_not_before() -> None:
    collecting = assembler()
    assert add(collecting, block([(0, 3), (0, 0), (1, 0)])) == {}
    assert add(collecting, block([(0, 1)])) == {}
    assert_whole(add(collecting, block([(0, 2)])), [0])


def test_a_block_may_complete_several_parts() -> None:
    assert_whole(add(assembler(), block(PLACES[::-1])), list(PARTS))


def test_the_first_of_two_rows_of_a_place_counts() -> None:
    collecting = assembler(5)
    add(collecting, block([(5, 0)]))
    add(collecting, block([(5, 0), (5, 1)], label="dog"))
    [part] = add(collecting, block([(5, 2)])).values()
    assert part["label"].to_pylist() == ["cat", "dog", "cat"]


def test_the_first_of_two_rows_of_a_place_in_one_block_counts() -> None:
    rows = pa.concat_tables([block([(5, 1)]), block([(5, 1), (5, 0), (5, 2)], label="dog")])
    [part] = add(assembler(5), rows).values()
    assert part["label"].to_pylist() == ["dog", "cat", "dog"]


def test_rows_of_a_finished_part_are_dropped() -> None:
    collecting = assembler(5)
    add(collecting, block([(5, 0), (5, 1), (5, 2)]))
    assert add(collecting, block([(5, 0), (5, 1), (5, 2)])) == {}
    assert (collecting.taken, collecting.parts) == (3, {})


def test_rows_of_a_part_that_nobody_expects_are_dropped() -> None:
    collecting = assembler(5)
    assert add(collecting, block([(0, 0), (0, 1), (0, 2), (0, 3)])) == {}
    assert collecting.taken == 0


def test_a_block_without_rows_is_no_row() -> None:
    collecting = assembler()
    assert add(collecting, block([])) == {}
    assert collecting.taken == 0


@pytest.mark.parametrize("column", ["key", "etag"])
@pytest.mark.parametrize("held_rows", [0, 1000])
def test_a_part_of_other_images_is_refused(column: str, held_rows: int) -> None:
    rows = block([(5, 0), (5, 1), (5, 2)])
    names = [*rows[column].to_pylist()[:2], "other"]
    rows = rows.set_column(rows.schema.get_field_index(column), column, pa.array(names))
    with closing(assembler(5, held_rows=held_rows)) as collecting:
        add(collecting, rows.slice(1))
        with pytest.raises(CnnrayError, match="part 5 does not hold the images that were planned"):
            add(collecting, rows.slice(0, 1))


def test_images_that_changed_places_are_refused() -> None:
    rows = block([(5, 0), (5, 1), (5, 2)])
    places = pa.array([1, 0, 2], pa.int32())
    rows = rows.set_column(rows.schema.get_field_index("row"), "row", places)
    with pytest.raises(CnnrayError, match="part 5 does not hold the images that were planned"):
        add(assembler(5), rows)


# Spilling


@pytest.fixture
def spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, with nothing else in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def files_below(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


def test_rows_go_to_disk_only_beyond_the_bound(spills: Path) -> None:
    with closing(assembler(held_rows=3)) as collecting:
        add(collecting, block([(0, 0), (1, 0), (1, 1)]))
        assert list(spills.iterdir()) == []
        add(collecting, block([(5, 0)]))
        assert len(files_below(spills)) == 1


def test_the_part_with_the_most_rows_is_spilled(spills: Path) -> None:
    with closing(assembler(held_rows=3)) as collecting:
        add(collecting, block([(0, 0), (1, 0), (1, 1), (5, 0)]))
        held = {number: part.held_rows for number, part in collecting.parts.items()}
        assert held == {0: 1, 1: 0, 5: 1}


def test_a_spilled_part_is_whole_and_leaves_no_file(spills: Path) -> None:
    with closing(assembler(0, held_rows=0)) as collecting:
        for row in (3, 1, 0):
            add(collecting, block([(0, row)]))
        assert len(files_below(spills)) == 3
        assert_whole(add(collecting, block([(0, 2)])), [0])
        assert files_below(spills) == []


def test_a_row_that_is_on_disk_counts_once(spills: Path) -> None:
    with closing(assembler(5, held_rows=0)) as collecting:
        add(collecting, block([(5, 0), (5, 1)]))
        add(collecting, block([(5, 1), (5, 0)], label="dog"))
        assert_whole(add(collecting, block([(5, 2)])), [5])
        assert collecting.taken == 3


def test_close_removes_what_unfinished_parts_have_spilled(spills: Path) -> None:
    collecting = assembler(held_rows=0)
    add(collecting, block([(0, 0), (1, 0)]))
    assert files_below(spills) != []
    collecting.close()
    assert list(spills.iterdir()) == []


def test_close_without_spills_is_nothing(spills: Path) -> None:
    assembler().close()
    assert list(spills.iterdir()) == []
