"""Fingerprints of keys and ids: equal exactly where these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnray.labeling.fingerprints import (
    Fingerprints,
    id_fingerprints,
    is_member,
    is_repeat,
    join,
    key_fingerprints,
)

Inputs = Callable[..., pa.Table]

PAIRS = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=12)
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12)
"""Few values, so that many rows are the same, or the same in one half."""


def entries(pairs: Sequence[tuple[str, str]]) -> pa.Table:
    keys, etags = [key for key, _ in pairs], [etag for _, etag in pairs]
    return pa.table({"key": pa.array(keys, pa.string()), "etag": pa.array(etags, pa.string())})


def fingerprints(rows: Sequence[tuple[int, int]]) -> Fingerprints:
    return np.array(rows, np.uint64).reshape(-1, 2)


def test_a_fingerprint_is_that_of_the_key_whatever_is_beside_it(inputs: Inputs) -> None:
    one = key_fingerprints(inputs(("b", "1"), ("a", "2")))
    other = key_fingerprints(pa.concat_tables([inputs(("a", "3")), inputs("b")]))
    assert one.shape == (2, 2)
    assert one.tolist() == other[::-1].tolist()


def test_an_id_is_of_the_key_and_the_etag(inputs: Inputs) -> None:
    ids = id_fingerprints(inputs(("a", "1"), ("a", "2"), ("b", "1"), ("a", "1")))
    assert is_repeat(ids).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("", "a"), ("a", "")),
        (("a\0b", "c"), ("a", "b\0c")),
        (("a\nb", "c"), ("a", "b\nc")),
        (("2:bca", ""), ("a", "bc")),
        (("1:a", "1"), ("a", "1:1")),
        (("ä", "e"), ("a\u0308", "e")),
        (("k", ""), ("k ", "")),
    ],
)
def test_pairs_that_read_alike_have_different_ids(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    first, second = id_fingerprints(entries([one, other])).tolist()
    assert first != second


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_ids_are_equal_where_the_pairs_are(pairs: list[tuple[str, str]]) -> None:
    repeats = [pair in pairs[:n] for n, pair in enumerate(pairs)]
    assert is_repeat(id_fingerprints(entries(pairs))).tolist() == repeats


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_a_repeat_has_the_same_row_before_it(rows: list[tuple[int, int]]) -> None:
    repeats = [row in rows[:n] for n, row in enumerate(rows)]
    assert is_repeat(fingerprints(rows)).tolist() == repeats


@settings(max_examples=100, deadline=None)
@given(ROWS, ROWS)
def test_a_member_is_in_the_other_rows(
    rows: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    found = is_member(fingerprints(rows), fingerprints(others))
    assert found.tolist() == [row in others for row in rows]


def test_rows_are_joined_in_order() -> None:
    rows = join([fingerprints([(1, 2)]), fingerprints([]), fingerprints([(3, 4), (1, 2)])])
    assert rows.tolist() == [[1, 2], [3, 4], [1, 2]]
    assert rows.dtype == np.uint64


def test_nothing_is_no_rows(inputs: Inputs) -> None:
    assert join([]).shape == key_fingerprints(inputs()).shape == (0, 2)
    assert id_fingerprints(inputs()).shape == (0, 2)
    assert is_repeat(join([])).shape == is_member(join([]), join([])).shape == (0,)
