"""What is new: the listing without what is labelled, by key and etag."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnray.errors import DataError
from cnnray.labeling.ledger import ChangePolicy, Ledger, Selection, make_ledger, select_new
from cnnray.schema import ENTRY_SCHEMA, PLAN_SCHEMA

Inputs = Callable[..., pa.Table]
Pair = tuple[str, str]

ODD_KEYS = ["", " ", "\n", "a\nb", "a\0b", "a\0", "\"'", "../x", "x/", "#2", "café", "cafe\u0301"]
POLICIES: Sequence[ChangePolicy] = ("relabel", "ignore", "error")


def select(
    *listing: pa.Table, known: Iterable[pa.Table] = (), on_changed: ChangePolicy = "relabel"
) -> Selection:
    """What of a listing is new, with its spill in memory."""
    return select_new(listing, make_ledger(known), on_changed=on_changed, spill=io.BytesIO())


def pairs_of(selection: Selection) -> list[Pair]:
    return [(row["key"], row["etag"]) for table in selection.tables() for row in table.to_pylist()]


def keys_of(selection: Selection) -> list[str]:
    return [key for key, _ in pairs_of(selection)]


def test_all_of_it_is_new_to_a_new_table(inputs: Inputs) -> None:
    selection = select(inputs("b", "a"), inputs("c"))
    assert keys_of(selection) == ["b", "a", "c"]
    assert (selection.listed, selection.rows, selection.duplicates) == (3, 3, 0)


def test_what_is_labelled_is_left_out(inputs: Inputs) -> None:
    selection = select(inputs("a", "b", "c", "d"), known=[inputs("c"), inputs("a", "x")])
    assert keys_of(selection) == ["b", "d"]
    assert (selection.listed, selection.rows, selection.duplicates) == (4, 2, 0)


@pytest.mark.parametrize("on_changed", POLICIES)
def test_nothing_is_new_when_all_is_labelled(inputs: Inputs, on_changed: ChangePolicy) -> None:
    selection = select(inputs("a", "b"), known=[inputs("b", "a")], on_changed=on_changed)
    assert (selection.rows, list(selection.tables())) == (0, [])


@pytest.mark.parametrize("on_changed", POLICIES)
def test_a_listing_of_nothing_has_nothing_new(inputs: Inputs, on_changed: ChangePolicy) -> None:
    for listing in ([], [inputs()]):
        selection = select(*listing, known=[inputs("a")], on_changed=on_changed)
        assert (selection.listed, selection.rows, list(selection.tables())) == (0, 0, [])


def test_new_inputs_keep_all_that_the_listing_says(inputs: Inputs) -> None:
    listing = inputs(*((key, f"etag of {key}") for key in ODD_KEYS))
    selection = select(listing.slice(0, 5), inputs(), listing.slice(5), known=[inputs("other")])
    assert pa.concat_tables(selection.tables()).equals(listing)


def test_columns_that_no_plan_has_are_left_out() -> None:
    row = {"key": "a", "path": "p", "offset": 7, "length": 9, "etag": "e", "label": "cat"}
    [table] = select(pa.Table.from_pylist([row], ENTRY_SCHEMA)).tables()
    assert table.schema.equals(PLAN_SCHEMA)


def test_the_new_inputs_can_be_read_again(inputs: Inputs) -> None:
    selection = select(inputs("a", "b"), inputs("c"), known=[inputs("b")])
    assert keys_of(selection) == keys_of(selection) == ["a", "c"]


def test_a_spill_on_disk_is_as_good(inputs: Inputs, tmp_path: Path) -> None:
    with (tmp_path / "spill").open("w+b") as spill:
        ledger = make_ledger([inputs("b")])
        selection = select_new([inputs("a", "b")], ledger, on_changed="relabel", spill=spill)
        assert keys_of(selection) == ["a"]


# Duplicates


def test_of_a_key_that_is_listed_twice_the_first_counts(inputs: Inputs) -> None:
    selection = select(inputs(("a", "1"), "b", ("a", "2")), inputs("b", "c", ("a", "1")))
    assert pairs_of(selection) == [("a", "1"), ("b", "e"), ("c", "e")]
    assert (selection.listed, selection.rows, selection.duplicates) == (6, 3, 3)


def test_a_duplicate_of_what_is_labelled_is_not_new(inputs: Inputs) -> None:
    selection = select(inputs("a", ("a", "2"), "b"), known=[inputs("a")])
    assert keys_of(selection) == ["b"]
    assert selection.duplicates == 1


@pytest.mark.parametrize("on_changed", ["ignore", "error"])
def test_a_duplicate_with_another_etag_is_no_change(
    inputs: Inputs, on_changed: ChangePolicy
) -> None:
    selection = select(inputs("a", ("a", "2")), known=[inputs("a")], on_changed=on_changed)
    assert (selection.rows, selection.duplicates) == (0, 1)


# Changed images


def test_a_changed_image_is_labelled_again(inputs: Inputs) -> None:
    selection = select(inputs(("a", "2"), "b", "c"), known=[inputs("a", "b")])
    assert pairs_of(selection) == [("a", "2"), ("c", "e")]


def test_an_image_that_changed_twice_is_known_by_its_last_etag(inputs: Inputs) -> None:
    known = [inputs(("a", "1")), inputs(("a", "2"))]
    assert pairs_of(select(inputs(("a", "2")), known=known)) == []
    assert pairs_of(select(inputs(("a", "3")), known=known)) == [("a", "3")]


def test_a_changed_image_keeps_its_old_row_under_ignore(inputs: Inputs) -> None:
    listing, known = inputs(("a", "2"), "b", "c"), [inputs("a", "b")]
    assert pairs_of(select(listing, known=known, on_changed="ignore")) == [("c", "e")]


def test_changed_images_are_an_error_that_counts_them_and_names_the_first(inputs: Inputs) -> None:
    listing = [inputs("c", "b"), inputs(("a\nb", "2"), ("d", "2"), "e")]
    known = [inputs("d", "b", "a\nb")]
    with pytest.raises(DataError) as failure:
        select(*listing, known=known, on_changed="error")
    message, hint = str(failure.value).split("\n")
    assert message == "2 images have changed since they were labelled, 'a\\nb' first"
    assert hint.startswith("hint: --on_changed relabel")


def test_new_images_are_no_changed_images(inputs: Inputs) -> None:
    selection = select(inputs("a", "b"), known=[inputs("a")], on_changed="error")
    assert keys_of(selection) == ["b"]


# Names


@pytest.mark.parametrize("known", ODD_KEYS)
def test_odd_keys_are_told_apart(inputs: Inputs, known: str) -> None:
    selection = select(inputs(*ODD_KEYS), known=[inputs(known)], on_changed="error")
    assert keys_of(selection) == [key for key in ODD_KEYS if key != known]


@pytest.mark.parametrize(
    ("known", "new"), [(("a", "bc"), ("ab", "c")), (("", "a"), ("a", "")), (("1:", ""), ("", "1:"))]
)
def test_pairs_that_read_alike_are_told_apart(inputs: Inputs, known: Pair, new: Pair) -> None:
    assert pairs_of(select(inputs(known, new), known=[inputs(known)])) == [new]


def expected(
    listing: Sequence[Pair], known: Sequence[Pair], on_changed: ChangePolicy
) -> list[Pair] | None:
    """What is new, said in plain Python; None where it is an error."""
    firsts = dict(reversed(listing))
    pairs = [(key, firsts[key]) for key in dict.fromkeys(key for key, _ in listing)]
    known_keys = {key for key, _ in known}
    changed = [pair for pair in pairs if pair not in known and pair[0] in known_keys]
    if on_changed == "error" and changed:
        return None
    left_out = [*known, *(changed if on_changed == "ignore" else [])]
    return [pair for pair in pairs if pair not in left_out]


PAIRS = st.lists(st.tuples(st.sampled_from(["", "a", "b", "ab"]), st.sampled_from(["", "b", "c"])))


@settings(max_examples=150, deadline=None)
@given(
    listing=PAIRS, known=PAIRS, cut=st.integers(1, 5), on_changed=st.sampled_from(list(POLICIES))
)
def test_new_is_what_plain_python_finds(
    listing: list[Pair], known: list[Pair], cut: int, on_changed: ChangePolicy
) -> None:
    def tables(pairs: list[Pair]) -> list[pa.Table]:
        rows = [{"key": k, "path": "", "offset": 0, "length": -1, "etag": e} for k, e in pairs]
        starts = range(0, len(rows), cut)
        return [pa.Table.from_pylist(rows[start : start + cut], PLAN_SCHEMA) for start in starts]

    wanted = expected(listing, known, on_changed)
    if wanted is None:
        with pytest.raises(DataError):
            select(*tables(listing), known=tables(known), on_changed=on_changed)
        return
    selection = select(*tables(listing), known=tables(known), on_changed=on_changed)
    assert pairs_of(selection) == wanted
    assert (selection.listed, selection.rows) == (len(listing), len(wanted))
    assert selection.duplicates == len(listing) - len({key for key, _ in listing})


def test_the_ledger_of_nothing_is_empty() -> None:
    ledger: Ledger = make_ledger([])
    assert ledger.keys.shape == ledger.ids.shape == (0, 2)
