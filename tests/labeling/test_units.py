"""Units of a plan: every row once, small at both ends, few in all."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnray.labeling.plan import LabelPlan
from cnnray.labeling.units import PlanUnit, plan_units
from cnnray.storage import open_store


def plan(rows: int, part_rows: int) -> LabelPlan:
    """A plan of which nothing is read."""
    return LabelPlan(open_store("."), "", rows, part_rows, 1, 0, [])


def units_of(rows: int, part_rows: int, **options: int) -> list[PlanUnit]:
    given = plan(rows, part_rows)
    values = {"chunk_rows": 256, "workers": 2, "max_units": 2000} | options
    return plan_units(given, range(given.num_parts), **values)


@given(
    rows=st.integers(1, 5000),
    part_rows=st.integers(1, 2000),
    chunk_rows=st.integers(1, 300),
    workers=st.integers(1, 40),
    max_units=st.integers(1, 50),
)
def test_every_row_is_in_one_unit(rows, part_rows, chunk_rows, workers, max_units):
    units = units_of(rows, part_rows, chunk_rows=chunk_rows, workers=workers, max_units=max_units)
    places = [(unit.part, row) for unit in units for row in range(unit.start, unit.stop)]
    assert places == [divmod(number, part_rows) for number in range(rows)]


def test_units_are_small_at_both_ends_and_larger_between_them():
    sizes = [unit.stop - unit.start for unit in units_of(16_000, 65_536)]
    assert sizes[:4] == [256] * 4
    assert sizes[-4:-1] == [256] * 3
    assert set(sizes[4:-5]) == {1024}


@pytest.mark.parametrize("rows", [10**6, 10**7, 10**8])
def test_a_large_run_has_about_as_many_units_as_allowed(rows):
    assert len(units_of(rows, 65_536)) <= 2000 + rows // 65_536 + 8


def test_the_parts_that_are_missing_keep_their_order():
    units = plan_units(plan(30, 10), [2, 0], chunk_rows=10, workers=1, max_units=9)
    assert units == [PlanUnit(2, 0, 10), PlanUnit(0, 0, 10)]
    assert units[0].to_table() == pa.table({"part": [2], "start": [0], "stop": [10]})
