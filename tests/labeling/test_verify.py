"""The proof of a table: nothing wrong with a good one, and each kind of damage is named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cnnray.labeling.plan as plan_module
import cnnray.labeling.verify as verify_module
from cnnray.errors import ConflictError, UnavailableError
from cnnray.labeling.commit import Run, finish_run, seal_run
from cnnray.labeling.log import append_entry, entry_key, read_log
from cnnray.labeling.parts import write_part
from cnnray.labeling.plan import PLAN_FOLDER, write_plan
from cnnray.labeling.verify import Proof, verify_table
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import Store, encode_json

Inputs = Callable[..., pa.Table]
LabelRows = Callable[..., pa.Table]
Begin = Callable[..., tuple[Run, bool]]
Publish = Callable[..., Any]
LabelAll = Callable[..., Run]
Snapshot = Callable[[], dict[str, tuple[int, bytes]]]

NOTHING = LABELS_SCHEMA.empty_table()


@pytest.fixture
def run(inputs: Inputs, label_all: LabelAll) -> Run:
    """A committed run with parts of abc, def and gh; b is an error."""
    return label_all(inputs(*"abcdefgh"), bad=["b"])


def assert_only_problem(store: Store, problem: str) -> None:
    assert verify_table(store).problems == [problem]


def swapped(data: bytes, rows: Sequence[int]) -> bytes:
    """A part with its rows in another order, and its footer as it was."""
    table = pq.ParquetFile(io.BytesIO(data)).read()
    buffer = io.BytesIO()
    pq.write_table(table.take(pa.array(rows)), buffer)
    return buffer.getvalue()


# Good tables


def test_a_table_without_runs_is_whole(store: Store) -> None:
    assert verify_table(store) == Proof()


def test_a_good_table_has_no_problem(
    store: Store, run: Run, inputs: Inputs, label_all: LabelAll
) -> None:
    label_all(inputs("a", "i", "j"), bad=["j"])
    assert verify_table(store) == Proof(runs=2, rows=10, errors=2, parts=4)


@pytest.mark.usefixtures("run")
def test_a_proof_writes_nothing(store: Store, snapshot: Snapshot) -> None:
    before = snapshot()
    verify_table(store)
    assert snapshot() == before


def test_plans_of_several_pieces_are_proven(
    store: Store, inputs: Inputs, label_all: LabelAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "PIECE_ROWS", 3)
    run = label_all(inputs(*"abcdefgh"))
    assert len(run.plan.pieces) == 3
    assert verify_table(store) == Proof(runs=1, rows=8, parts=3)


def test_an_open_run_is_reported_and_no_problem(
    store: Store, run: Run, inputs: Inputs, begin: Begin, publish: Publish
) -> None:
    following, _ = begin(inputs(*"ijklmn"))
    publish(following, [1], bad=["m"])
    proof = verify_table(store)
    assert proof == Proof(runs=2, open_run=following.id, rows=11, errors=2, parts=4)


def test_sealed_parts_are_counted_and_no_problem(
    store: Store, inputs: Inputs, begin: Begin, publish: Publish, label_all: LabelAll
) -> None:
    run, _ = begin(inputs(*"abcdefgh"))
    publish(run, [1])
    seal_run(run, NOTHING)
    assert verify_table(store) == Proof(runs=1, rows=3, parts=3, sealed=2)
    label_all(inputs(*"abcdefgh"))
    assert verify_table(store) == Proof(runs=2, rows=8, parts=5, sealed=2)


def test_a_changed_image_that_was_labelled_again_is_no_repeat(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    label_all(inputs("a"))
    label_all(inputs(("a", "new")))
    assert verify_table(store) == Proof(runs=2, rows=2, parts=2)


# Parts


def test_a_deleted_part_is_named(store: Store, run: Run) -> None:
    store.delete(run.part_key(1))
    assert verify_table(store) == Proof(
        runs=1, rows=5, errors=1, parts=2, problems=[f"{run.part_key(1)} is missing"]
    )


def test_all_deleted_parts_are_named(store: Store, run: Run) -> None:
    for part in range(3):
        store.delete(run.part_key(part))
    assert verify_table(store).problems == [f"{run.part_key(n)} is missing" for n in range(3)]


WAS_CHANGED = "was changed: its SHA-256 is not the one of the manifest"


def test_a_part_with_the_same_images_and_other_labels_is_named(
    store: Store, run: Run, inputs: Inputs, label_rows: LabelRows
) -> None:
    store.delete(run.part_key(1))
    rows = label_rows(inputs(*"def"), label="dog")
    write_part(store, run.part_key(1), rows, run=run.id, part=1)
    assert_only_problem(store, f"{run.part_key(1)} {WAS_CHANGED}")


@pytest.mark.parametrize("place", [5, 100, -10])
def test_a_part_with_a_flipped_byte_is_named(store: Store, run: Run, place: int) -> None:
    data = bytearray(store.read(run.part_key(0)))
    data[place] ^= 1
    store.write(run.part_key(0), bytes(data))
    assert_only_problem(store, f"{run.part_key(0)} {WAS_CHANGED}")


def test_a_part_that_was_cut_off_is_named(store: Store, run: Run) -> None:
    store.write(run.part_key(2), store.read(run.part_key(2))[:-1])
    assert_only_problem(store, f"{run.part_key(2)} {WAS_CHANGED}")


def test_a_part_that_was_sealed_by_hand_is_named(store: Store, run: Run) -> None:
    store.delete(run.part_key(1))
    write_part(store, run.part_key(1), NOTHING, run=run.id, part=1)
    assert_only_problem(store, f"{run.part_key(1)} {WAS_CHANGED}")


def test_a_file_that_is_not_of_the_table_is_named(store: Store, run: Run) -> None:
    for key in ("data/other.parquet", f"data/run={run.id}/copy.parquet", "data/run=0/x.parquet"):
        store.write(key, store.read(run.part_key(0)))
        assert_only_problem(store, f"{key} belongs to no run: readers of data/ see its rows")
        store.delete(key)


def test_other_files_beside_data_are_no_problem(store: Store, run: Run) -> None:
    store.write("README.txt", b"labels of my photos")
    store.write("_cnnray/plans/of-a-driver-that-lost.parquet", b"x")
    assert verify_table(store).problems == []


# Parts of an open run, which no manifest has yet


@pytest.fixture
def open_run(inputs: Inputs, begin: Begin, publish: Publish) -> Run:
    """An open run with parts of abc, def and gh, all of them there."""
    run, _ = begin(inputs(*"abcdefgh"))
    publish(run)
    return run


def test_a_missing_part_of_an_open_run_is_no_problem(store: Store, open_run: Run) -> None:
    store.delete(open_run.part_key(1))
    assert verify_table(store) == Proof(runs=1, open_run=open_run.id, rows=5, parts=2)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_part_of_an_open_run_that_was_cut_off_is_named(
    store: Store, open_run: Run, cut: int
) -> None:
    store.write(open_run.part_key(1), store.read(open_run.part_key(1))[:-cut])
    assert_only_problem(
        store, f"{open_run.part_key(1)} is not a part of a table of labels, or damaged"
    )


def test_a_part_of_an_open_run_with_flipped_bytes_is_named(store: Store, open_run: Run) -> None:
    data = bytearray(store.read(open_run.part_key(1)))
    data[4:60] = bytes(56)  # within the first column
    store.write(open_run.part_key(1), bytes(data))
    assert_only_problem(
        store, f"{open_run.part_key(1)} is not a part of a table of labels, or damaged"
    )


def test_a_part_of_an_open_run_in_place_of_another_is_named(store: Store, open_run: Run) -> None:
    store.write(open_run.part_key(1), store.read(open_run.part_key(0)))
    assert_only_problem(store, f"{open_run.part_key(1)} is part 0 of run {open_run.id}")


def test_a_part_of_an_open_run_with_other_images_is_named(
    store: Store, open_run: Run, inputs: Inputs, label_rows: LabelRows
) -> None:
    store.delete(open_run.part_key(1))
    rows = label_rows(inputs("d", "e", "not f"))
    write_part(store, open_run.part_key(1), rows, run=open_run.id, part=1)
    assert_only_problem(store, f"{open_run.part_key(1)} does not hold the images that were planned")


def test_a_part_of_an_open_run_in_another_order_is_named(store: Store, open_run: Run) -> None:
    store.write(open_run.part_key(1), swapped(store.read(open_run.part_key(1)), [1, 0, 2]))
    assert_only_problem(store, f"{open_run.part_key(1)} does not hold the images that were planned")


def test_a_part_of_an_open_run_with_other_etags_is_named(
    store: Store, open_run: Run, inputs: Inputs, label_rows: LabelRows
) -> None:
    store.delete(open_run.part_key(2))
    rows = label_rows(inputs("g", ("h", "new")))
    write_part(store, open_run.part_key(2), rows, run=open_run.id, part=2)
    assert_only_problem(store, f"{open_run.part_key(2)} does not hold the images that were planned")


# Images that are there twice


def test_an_id_in_two_runs_is_found(
    store: Store, run: Run, inputs: Inputs, publish: Publish, last_run: Callable[[], Run]
) -> None:
    plan = write_plan(store, [inputs("x", "c", "h")], part_rows=3, duplicates=0)
    document = {"kind": "open", "run": "again", "plan": plan.digest, "config": {}}
    append_entry(store, read_log(store), document)
    finish_run(last_run(), publish(last_run()))
    assert verify_table(store).rows == 11
    assert_only_problem(store, "2 rows have the key and etag of another row")


def test_a_part_that_was_copied_into_another_run_is_named(
    store: Store, run: Run, inputs: Inputs, begin: Begin
) -> None:
    following, _ = begin(inputs(*"ijk"))
    store.write(following.part_key(0), store.read(run.part_key(0)))
    assert_only_problem(store, f"{following.part_key(0)} is part 0 of run {run.id}")


# Plans, manifests and the log


def test_a_changed_manifest_is_the_only_problem(store: Store, run: Run) -> None:
    store.write(run.manifest_key, store.read(run.manifest_key) + b"x")
    assert_only_problem(store, f"{store.uri}/{run.manifest_key} was changed since the commit")


def test_a_deleted_manifest_is_the_only_problem(store: Store, run: Run) -> None:
    store.delete(run.manifest_key)
    assert_only_problem(store, f"no such file: {store.uri}/{run.manifest_key}")


def test_a_changed_piece_is_the_only_problem(store: Store, run: Run) -> None:
    key = f"{PLAN_FOLDER}/{run.plan.pieces[0]}.parquet"
    store.write(key, store.read(key)[:-1])
    assert_only_problem(store, f"{store.uri}/{key} was changed: it is not what was planned")


def test_a_deleted_piece_is_the_only_problem(store: Store, run: Run) -> None:
    key = f"{PLAN_FOLDER}/{run.plan.pieces[0]}.parquet"
    store.delete(key)
    assert_only_problem(store, f"no such file: {store.uri}/{key}")


def test_a_changed_plan_is_the_only_problem(store: Store, run: Run) -> None:
    key = f"{PLAN_FOLDER}/{run.plan.digest}.json"
    store.write(key, store.read(key) + b" ")
    assert_only_problem(store, f"{store.uri}/{key} was changed: it is not what was planned")


def test_a_deleted_plan_is_the_only_problem(store: Store, run: Run) -> None:
    key = f"{PLAN_FOLDER}/{run.plan.digest}.json"
    store.delete(key)
    assert_only_problem(store, f"no such file: {store.uri}/{key}")


def damage_manifest(run: Run) -> None:
    run.store.write(run.manifest_key, b"x")


def damage_plan(run: Run) -> None:
    run.store.write(f"{PLAN_FOLDER}/{run.plan.digest}.json", b"{}")


def damage_piece(run: Run) -> None:
    run.store.delete(f"{PLAN_FOLDER}/{run.plan.pieces[0]}.parquet")


@pytest.mark.parametrize("damage", [damage_manifest, damage_plan, damage_piece])
def test_damage_in_one_run_does_not_hide_what_another_holds(
    store: Store, run: Run, inputs: Inputs, label_all: LabelAll, damage: Callable[[Run], None]
) -> None:
    following = label_all(inputs("i", "j"))
    store.delete(following.part_key(0))
    label_all(inputs("k"))
    damage(run)
    proof = verify_table(store)
    assert (proof.runs, proof.rows) == (3, 1)
    assert len(proof.problems) == 2
    assert proof.problems[1] == f"{following.part_key(0)} is missing"


def test_a_broken_log_is_no_proof_at_all(store: Store, run: Run) -> None:
    data = store.read(entry_key(1))
    store.write(entry_key(1), data.replace(b'"photos"', b'"videos"'))
    with pytest.raises(ConflictError, match="does not follow the entry before it"):
        verify_table(store)


def test_parts_of_a_run_whose_entry_was_removed_are_named(store: Store, open_run: Run) -> None:
    store.delete(entry_key(1))
    assert verify_table(store).problems == [
        f"{open_run.part_key(n)} belongs to no run: readers of data/ see its rows" for n in range(3)
    ]


@pytest.mark.parametrize("change", [{"rows": 800}, {"errors": 0}, {"sealed": 1}], ids=str)
def test_a_last_entry_with_other_sums_is_the_only_problem(
    store: Store, run: Run, change: dict[str, int]
) -> None:
    document = json.loads(store.read(entry_key(2)))
    store.write(entry_key(2), encode_json(document | change))
    assert_only_problem(
        store, f"{store.uri}/{run.manifest_key} has other sums than the log says of run {run.id}"
    )


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("change", [{"kind": "open"}, {"run": "another"}, {"rows": "8"}], ids=str)
def test_a_last_entry_that_ends_no_run_is_no_proof_at_all(
    store: Store, change: dict[str, str]
) -> None:
    document = json.loads(store.read(entry_key(2)))
    store.write(entry_key(2), encode_json(document | change))
    with pytest.raises(ConflictError, match=f"{entry_key(2)} says what cannot be said there"):
        verify_table(store)


def test_a_last_entry_with_another_manifest_is_a_problem(store: Store, run: Run) -> None:
    document = json.loads(store.read(entry_key(2)))
    store.write(entry_key(2), encode_json(document | {"manifest": "0" * 64}))
    assert_only_problem(store, f"{store.uri}/{run.manifest_key} was changed since the commit")


def test_a_last_entry_with_another_plan_is_a_problem(store: Store, open_run: Run) -> None:
    document = json.loads(store.read(entry_key(1)))
    store.write(entry_key(1), encode_json(document | {"plan": "0" * 64}))
    assert_only_problem(store, f"no such file: {store.uri}/{PLAN_FOLDER}/{'0' * 64}.json")


# Drivers that are at work


@dataclass
class BusyStore:
    """A store in which something happens when the first part is read."""

    store: Store
    happens: Callable[[], object]
    has_happened: bool = False

    def read(self, key: str) -> bytes:
        if key.startswith("data/") and not self.has_happened:
            self.has_happened = True
            self.happens()
        return self.store.read(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.mark.usefixtures("run")
def test_a_run_that_begins_during_the_proof_is_no_problem(
    store: Store, inputs: Inputs, begin: Begin, publish: Publish
) -> None:
    busy = BusyStore(store, happens=lambda: publish(begin(inputs("z"))[0]))
    assert verify_table(busy) == Proof(runs=1, rows=8, errors=1, parts=3)
    assert busy.has_happened


# Many problems, and no answer


def test_problems_are_listed_up_to_a_bound(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_PROBLEMS", 2)
    for part in range(3):
        store.delete(run.part_key(part))
    assert verify_table(store).problems == [f"{run.part_key(n)} is missing" for n in (0, 1)]


@dataclass
class SilentStore:
    """A store that no longer answers when it is asked for the objects of a folder."""

    store: Store
    folder: str

    def read(self, key: str) -> bytes:
        if key.startswith(self.folder):
            raise UnavailableError(f"no answer from {key}")
        return self.store.read(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("silent", ["data/", "_cnnray/plans/", "_cnnray/manifests/"])
def test_a_store_that_does_not_answer_is_no_damage(store: Store, silent: str) -> None:
    with pytest.raises(UnavailableError):
        verify_table(SilentStore(store, silent))
