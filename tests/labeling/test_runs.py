"""Whose table it is, and which run a driver works on: opened, joined, refused, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pytest

import cnnray.labeling.runs as runs_module
from cnnray.errors import (
    ConflictError,
    DataError,
    IncompleteError,
    StorageError,
)
from cnnray.labeling.commit import Run, finish_run, seal_run
from cnnray.labeling.ledger import ChangePolicy
from cnnray.labeling.log import read_log
from cnnray.labeling.plan import PLAN_FOLDER
from cnnray.labeling.runs import (
    TABLE_KEY,
    begin_run,
    claim_table,
    read_ledger,
    read_runs,
)
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import Store, read_json

Inputs = Callable[..., pa.Table]
Begin = Callable[..., Any]  # (Run, bool), or None
Publish = Callable[..., Any]
LabelAll = Callable[..., Run]
AtOnce = Callable[..., list[Any]]
Snapshot = Callable[[], dict[str, tuple[int, bytes]]]

NOTHING = LABELS_SCHEMA.empty_table()


def planned_keys(run: Run) -> list[str]:
    parts = run.plan.read_parts(range(run.plan.num_parts))
    return [key for _, table in parts for key in table["key"].to_pylist()]


def visible_keys(store: Store) -> list[str]:
    """What a plain reader of the table sees."""
    table = pa.dataset.dataset(f"{store.uri}/data").to_table()
    return sorted(table["key"].to_pylist())


# Whose table it is


def test_a_new_table_is_its_models(store: Store) -> None:
    claim_table(store, {"model": "m1", "top_k": 5})
    assert read_json(store, TABLE_KEY) == {"version": 1, "model": "m1", "top_k": 5}


def test_the_same_model_claims_again_and_writes_nothing(store: Store, snapshot: Snapshot) -> None:
    claim_table(store, {"model": "m1"})
    before = snapshot()
    claim_table(store, {"model": "m1"})
    assert snapshot() == before


def test_another_model_is_refused_by_name(store: Store, snapshot: Snapshot) -> None:
    claim_table(store, {"model": "m1", "top_k": 5})
    before = snapshot()
    with pytest.raises(ConflictError) as failure:
        claim_table(store, {"model": "m2", "top_k": 5})
    message, hint = str(failure.value).split("\n")
    assert message == f"{store.uri} holds labels of another kind: model 'm1', here 'm2'"
    assert hint == "hint: choose another --output: a new model is a new table"
    assert snapshot() == before


def test_all_that_differs_is_named(store: Store) -> None:
    claim_table(store, {"model": "m1", "top_k": 5})
    with pytest.raises(ConflictError, match="model 'm1', here 'm2', top_k 5, here 3, more None"):
        claim_table(store, {"model": "m2", "top_k": 3, "more": True})


def test_what_the_table_has_beyond_is_named(store: Store) -> None:
    claim_table(store, {"model": "m1", "embeddings": True})
    with pytest.raises(ConflictError, match="embeddings True"):
        claim_table(store, {"model": "m1"})


def test_foreign_data_is_refused_and_named(store: Store, snapshot: Snapshot) -> None:
    store.write("data/2024/labels.parquet", b"somebody's")
    before = snapshot()
    with pytest.raises(ConflictError, match=r"data/2024/labels\.parquet is there, but not"):
        claim_table(store, {"model": "m1"})
    assert snapshot() == before


def test_a_table_whose_identity_is_lost_is_refused(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    label_all(inputs("a"))
    store.delete(TABLE_KEY)
    with pytest.raises(ConflictError, match=f"is there, but not {TABLE_KEY}"):
        claim_table(store, {"model": "toy"})


def test_other_files_beside_the_table_do_not_matter(store: Store) -> None:
    store.write("README.txt", b"labels of my photos")
    claim_table(store, {"model": "m1"})
    assert read_json(store, TABLE_KEY)["model"] == "m1"


def test_an_identity_that_is_no_json_is_an_error(store: Store) -> None:
    store.write(TABLE_KEY, b"\xff")
    with pytest.raises(StorageError, match=f"{TABLE_KEY} is not JSON"):
        claim_table(store, {"model": "m1"})


def test_an_identity_that_is_no_object_is_refused(store: Store) -> None:
    store.write(TABLE_KEY, b"[]")
    with pytest.raises(ConflictError, match=f"{TABLE_KEY} was changed"):
        claim_table(store, {"model": "m1"})


@dataclass
class OverwritingStore:
    """A store without conditional writes."""

    store: Store

    def refuses_overwrite(self, key: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_a_store_that_overwrites_is_refused(store: Store, snapshot: Snapshot) -> None:
    with pytest.raises(StorageError, match=r"has no conditional writes\nhint: .*--single_writer"):
        claim_table(OverwritingStore(store), {"model": "m1"})
    assert snapshot() == {}


def test_of_two_models_at_once_one_has_the_table(store: Store, at_once: AtOnce) -> None:
    results = at_once(
        lambda: claim_table(store, {"model": "m1"}), lambda: claim_table(store, {"model": "m2"})
    )
    loser = results.index(None) ^ 1
    assert isinstance(results[loser], ConflictError)
    assert read_json(store, TABLE_KEY)["model"] == ("m2", "m1")[loser]


def test_drivers_of_one_model_may_claim_at_once(store: Store, at_once: AtOnce) -> None:
    assert at_once(*3 * [lambda: claim_table(store, {"model": "m1"})]) == [None] * 3


# A new run


def test_a_new_run_plans_the_listing(store: Store, inputs: Inputs, begin: Begin) -> None:
    run, is_mine = begin(inputs("c", "a", "b", "a", "d"))
    assert is_mine
    assert planned_keys(run) == ["c", "a", "b", "d"]
    assert (run.plan.num_parts, run.plan.part_rows, run.plan.duplicates) == (2, 3, 1)
    assert run.commit is None
    assert run.part_key(1) == f"data/run={run.id}/part-00001-of-00002.parquet"


def test_a_new_run_is_in_the_log(store: Store, inputs: Inputs, begin: Begin) -> None:
    run, _ = begin(inputs("a"), config={"input": "photos", "limits.max_bytes": 7})
    [entry] = read_log(store)
    assert entry.document == {
        "previous": None,
        "kind": "open",
        "run": run.id,
        "plan": run.plan.digest,
        "config": {"input": "photos", "limits.max_bytes": 7},
    }
    assert read_runs(store, [entry]) == [run]


def test_a_run_is_named_by_its_entry_its_time_and_its_plan(inputs: Inputs, begin: Begin) -> None:
    run, _ = begin(inputs("a"))
    number, time, plan = run.id.split("-")
    assert (number, plan) == ("00000001", run.plan.digest[:8])
    assert time.startswith("20")
    assert time.endswith("Z")


def test_an_empty_listing_opens_no_run_and_writes_nothing(
    store: Store, inputs: Inputs, snapshot: Snapshot
) -> None:
    begun = begin_run(
        store,
        config={},
        list_inputs=lambda: [inputs()],
        part_rows=3,
        on_changed="relabel",
    )
    assert begun is None
    assert snapshot() == {}


@pytest.mark.parametrize("on_changed", ["relabel", "ignore", "error"])
def test_nothing_new_opens_no_run_and_writes_nothing(
    inputs: Inputs,
    begin: Begin,
    label_all: LabelAll,
    snapshot: Snapshot,
    on_changed: ChangePolicy,
) -> None:
    label_all(inputs("a", "b", "c", "d"))
    before = snapshot()
    assert begin(inputs("d", "b"), on_changed=on_changed) is None
    assert snapshot() == before


def test_a_later_run_plans_only_what_is_new(
    store: Store, inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    label_all(inputs("a", "b", "c", "d"))
    label_all(inputs("d", "e"))
    run, is_mine = begin(inputs("f", "e", "d", "c", "g"))
    assert is_mine
    assert planned_keys(run) == ["f", "g"]
    assert run.id.startswith("00000005-")


def test_three_nights_label_every_image_once(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    for night in (["a", "b"], ["a", "b", "c", "d", "e", "f"], ["g", "a", "f"]):
        label_all(inputs(*night))
    assert visible_keys(store) == list("abcdefg")


# Changed images


def test_a_changed_image_is_planned_again(
    inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    label_all(inputs("a", "b"))
    run, _ = begin(inputs("a", ("b", "new")))
    assert planned_keys(run) == ["b"]


def test_a_changed_image_is_not_planned_under_ignore(
    inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    label_all(inputs("a", "b"))
    run, _ = begin(inputs(("b", "new"), "c"), on_changed="ignore")
    assert planned_keys(run) == ["c"]


def test_a_changed_image_is_an_error_that_writes_nothing(
    inputs: Inputs, begin: Begin, label_all: LabelAll, snapshot: Snapshot
) -> None:
    label_all(inputs("a", "b"))
    before = snapshot()
    with pytest.raises(DataError, match="1 images have changed since"):
        begin(inputs(("b", "new"), "c"), on_changed="error")
    assert snapshot() == before


# An open run


def test_an_open_run_with_the_same_settings_is_joined(
    inputs: Inputs, begin: Begin, snapshot: Snapshot
) -> None:
    run, _ = begin(inputs("a", "b"))
    before = snapshot()
    assert begin(inputs("a", "b")) == (run, False)
    assert snapshot() == before


def test_a_driver_that_joins_lists_nothing(store: Store, inputs: Inputs, begin: Begin) -> None:
    run, _ = begin(inputs("a"))

    def list_inputs() -> Iterator[pa.Table]:
        raise AssertionError("a listing of a billion images")

    begun = begin_run(
        store,
        config={"input": "photos"},
        list_inputs=list_inputs,
        part_rows=3,
        on_changed="relabel",
    )
    assert begun == (run, False)


def test_what_comes_during_a_run_is_for_the_next(
    inputs: Inputs, begin: Begin, publish: Publish
) -> None:
    begin(inputs("a", "b"))
    joined, _ = begin(inputs("a", "b", "c"))
    assert planned_keys(joined) == ["a", "b"]
    finish_run(joined, publish(joined))
    following, is_mine = begin(inputs("a", "b", "c"))
    assert is_mine
    assert planned_keys(following) == ["c"]


def test_an_open_run_with_other_settings_is_refused_by_name(
    inputs: Inputs, begin: Begin, snapshot: Snapshot
) -> None:
    run, _ = begin(inputs("a"), config={"input": "photos", "part_rows": 3, "format": "auto"})
    before = snapshot()
    with pytest.raises(ConflictError) as failure:
        begin(inputs("a"), config={"input": "photos", "part_rows": 5, "format": "table"})
    message, hint = str(failure.value).split("\n")
    assert message == (
        f"run {run.id} is open with other settings:"
        " --format auto, here table, --part_rows 3, here 5"
    )
    assert "--abort" in hint
    assert snapshot() == before


@pytest.mark.parametrize(
    ("mine", "theirs", "named"),
    [({"a": 1}, {}, "--a None, here 1"), ({}, {"a": 1}, "--a 1, here None")],
)
def test_a_setting_that_one_driver_has_not_is_named(
    inputs: Inputs, begin: Begin, mine: dict[str, int], theirs: dict[str, int], named: str
) -> None:
    begin(inputs("a"), config=theirs)
    with pytest.raises(ConflictError, match=named):
        begin(inputs("a"), config=mine)


def test_other_settings_are_fine_once_the_run_is_committed(
    inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    label_all(inputs("a"), config={"input": "photos"})
    run, is_mine = begin(inputs("b"), config={"input": "more photos"})
    assert (is_mine, planned_keys(run)) == (True, ["b"])


def test_a_changed_log_is_refused(store: Store, inputs: Inputs, label_all: LabelAll) -> None:
    label_all(inputs("a"))
    store.delete("_cnnray/log/00000000000000000001.json")
    with pytest.raises(ConflictError, match="log of this table was changed"):
        label_all(inputs("b"))


def test_a_changed_plan_of_an_earlier_run_is_refused(
    store: Store, inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    run = label_all(inputs("a"))
    key = f"{PLAN_FOLDER}/{run.plan.pieces[0]}.parquet"
    store.write(key, store.read(key) + b"x")
    with pytest.raises(ConflictError, match=f"{key} was changed"):
        begin(inputs("b"))


# Runs that were sealed


def test_images_of_sealed_parts_are_planned_again(
    store: Store, inputs: Inputs, begin: Begin, publish: Publish, label_all: LabelAll
) -> None:
    listing = inputs(*"abcdefgh")  # parts of abc, def, gh
    run, _ = begin(listing)
    publish(run, [1])
    seal_run(run, NOTHING)
    following, is_mine = begin(listing)
    assert is_mine
    assert planned_keys(following) == ["a", "b", "c", "g", "h"]
    finish_run(following, publish(following))
    assert visible_keys(store) == list("abcdefgh")
    assert begin(listing) is None


def test_images_of_a_run_that_was_sealed_at_once_are_planned_again(
    inputs: Inputs, begin: Begin
) -> None:
    run, _ = begin(inputs("a", "b"))
    seal_run(run, NOTHING)
    following, _ = begin(inputs("a", "b"))
    assert following.id != run.id
    assert following.plan.digest == run.plan.digest


def test_sealed_images_that_changed_since_are_no_changed_images(
    inputs: Inputs, begin: Begin
) -> None:
    run, _ = begin(inputs("a"))
    seal_run(run, NOTHING)
    following, _ = begin(inputs(("a", "new")), on_changed="error")
    assert planned_keys(following) == ["a"]


# Several drivers


def test_of_drivers_at_once_one_opens_the_run_and_the_others_join(
    store: Store, inputs: Inputs, begin: Begin, at_once: AtOnce
) -> None:
    claim_table(store, {"model": "toy"})
    listings = [inputs("a", "b"), inputs("a", "b", "c"), inputs("b", "a")]
    results = at_once(*(lambda listing=listing: begin(listing) for listing in listings))
    assert sorted(is_mine for _, is_mine in results) == [False, False, True]
    assert len({run.id for run, _ in results}) == 1
    assert len(read_log(store)) == 1


def test_a_driver_that_was_slower_plans_without_what_the_faster_one_labelled(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    others = iter([inputs("a"), inputs("c")])  # labelled while this driver is listing

    def list_inputs() -> list[pa.Table]:
        listing = next(others, None)
        if listing is not None:
            label_all(listing)
        return [inputs("a", "b", "c", "d")]

    begun = begin_run(
        store,
        config={"input": "photos"},
        list_inputs=list_inputs,
        part_rows=3,
        on_changed="relabel",
    )
    assert begun is not None
    run, is_mine = begun
    assert is_mine
    assert planned_keys(run) == ["b", "d"]


def test_a_driver_that_always_loses_gives_up(
    store: Store, inputs: Inputs, label_all: LabelAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "MAX_RACES", 2)
    others = iter("abc")

    def list_inputs() -> list[pa.Table]:
        label_all(inputs(next(others)))
        return [inputs("z")]

    with pytest.raises(IncompleteError, match="other drivers were 2 times faster"):
        begin_run(
            store,
            config={"input": "photos"},
            list_inputs=list_inputs,
            part_rows=3,
            on_changed="relabel",
        )


# What the log says


def test_runs_are_read_oldest_first_and_only_the_last_is_open(
    store: Store, inputs: Inputs, begin: Begin, label_all: LabelAll
) -> None:
    first = label_all(inputs("a"))
    second = label_all(inputs("b"))
    third, _ = begin(inputs("c"))
    assert read_runs(store, read_log(store)) == [first, second, third]
    assert first.commit is not None
    assert second.commit is not None
    assert third.commit is None


def test_a_table_without_a_log_has_no_runs(store: Store) -> None:
    assert read_runs(store, read_log(store)) == []


def test_the_ledger_is_of_committed_runs_without_sealed_parts(
    store: Store, inputs: Inputs, begin: Begin, publish: Publish, label_all: LabelAll
) -> None:
    label_all(inputs("a"))
    sealed, _ = begin(inputs("a", "b", "c", "d", "e"))  # parts of bcd, e
    publish(sealed, [0])
    seal_run(sealed, NOTHING)
    begin(inputs("f"))
    ledger = read_ledger(read_runs(store, read_log(store)))
    assert ledger.keys.shape == ledger.ids.shape == (4, 2)


def test_planning_leaves_no_file_behind(
    inputs: Inputs, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    begin(inputs("a", "b"))
    assert list(folder.iterdir()) == []
