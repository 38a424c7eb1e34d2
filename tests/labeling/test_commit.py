"""Committing: all parts are there and as planned, the manifest says so, the log has it once."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cnnray.labeling.plan as plan_module
from cnnray.errors import ConflictError, IncompleteError
from cnnray.labeling.commit import (
    CHECK_THREADS,
    Run,
    RunTotals,
    finish_run,
    labelled_inputs,
    publish_part,
    published_parts,
    read_manifest,
    read_totals,
    seal_run,
)
from cnnray.labeling.log import entry_key, read_log
from cnnray.labeling.parts import write_part
from cnnray.schema import LABELS_SCHEMA, PARTS_SCHEMA
from cnnray.storage import Store, encode_json, sha256

Inputs = Callable[..., pa.Table]
LabelRows = Callable[..., pa.Table]
Begin = Callable[..., tuple[Run, bool]]
Publish = Callable[..., Any]
AtOnce = Callable[..., list[Any]]
Snapshot = Callable[[], dict[str, tuple[int, bytes]]]

NOTHING = LABELS_SCHEMA.empty_table()
WHOLE = RunTotals(rows=8, ok=8, errors=0, parts=3, sealed=0)


@pytest.fixture
def run(inputs: Inputs, begin: Begin) -> Run:
    """An open run with parts of abc, def and gh."""
    return begin(inputs(*"abcdefgh"))[0]


def kinds(store: Store) -> list[str]:
    return [entry.document["kind"] for entry in read_log(store)]


def keys_of(tables: Any) -> list[str]:
    return [key for table in tables for key in table["key"].to_pylist()]


# What is there


def test_a_run_that_nobody_has_worked_on_has_no_parts(run: Run) -> None:
    assert published_parts(run) == {}


def test_parts_are_found_by_number(store: Store, run: Run, publish: Publish) -> None:
    publish(run, [2, 0])
    found = published_parts(run)
    assert sorted(found) == [0, 2]
    assert found[2] == store.head(run.part_key(2))


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "part-00003-of-00003.parquet",
        "part-0.parquet",
        "more/part-00000-of-00003.parquet",
    ],
)
def test_a_file_that_is_not_of_the_plan_is_refused(
    store: Store, run: Run, publish: Publish, name: str
) -> None:
    published = publish(run)
    store.write(f"data/run={run.id}/{name}", b"x")
    with pytest.raises(ConflictError, match=f"{name} is not a part of run {run.id}"):
        finish_run(run, published)
    assert kinds(store) == ["open"]


# Committing


def test_a_whole_run_is_committed(store: Store, run: Run, publish: Publish) -> None:
    totals = finish_run(run, publish(run, bad=["b", "g"]))
    assert totals == RunTotals(rows=8, ok=6, errors=2, parts=3, sealed=0)
    opened, committed = read_log(store)
    assert committed.document == {
        "previous": opened.digest,
        "kind": "commit",
        "run": run.id,
        "manifest": sha256(store.read(run.manifest_key)),
        "rows": 8,
        "errors": 2,
        "sealed": 0,
    }


def test_the_manifest_says_what_the_parts_are(
    store: Store, run: Run, publish: Publish, last_run: Callable[[], Run]
) -> None:
    finish_run(run, publish(run, bad=["b"]))
    manifest = read_manifest(last_run())
    assert manifest.schema.equals(PARTS_SCHEMA)
    assert manifest["part"].to_pylist() == [0, 1, 2]
    assert manifest["rows"].to_pylist() == [3, 3, 2]
    assert manifest["ok"].to_pylist() == [2, 3, 2]
    assert manifest["errors"].to_pylist() == [1, 0, 0]
    for row in manifest.to_pylist():
        found, data = store.head(run.part_key(row["part"])), store.read(run.part_key(row["part"]))
        assert row["path"] == f"{store.uri}/{run.part_key(row['part'])}"
        assert (row["bytes"], row["etag"]) == (found.size, found.etag)
        assert row["sha256"] == sha256(data)


def test_the_paths_of_a_manifest_read_as_one_table(
    run: Run, publish: Publish, last_run: Callable[[], Run]
) -> None:
    finish_run(run, publish(run))
    paths = read_manifest(last_run())["path"].to_pylist()
    assert keys_of([pq.ParquetFile(path).read() for path in paths]) == list("abcdefgh")


@pytest.mark.parametrize(("there", "missing"), [([], 3), ([1], 2), ([0, 2], 1)])
def test_a_run_with_missing_parts_is_incomplete_and_nothing_is_written(
    run: Run, publish: Publish, snapshot: Snapshot, there: list[int], missing: int
) -> None:
    published = publish(run, there)
    before = snapshot()
    with pytest.raises(IncompleteError, match=f"{missing} of 3 parts are missing"):
        finish_run(run, published)
    assert snapshot() == before


def test_committing_twice_is_committing_once(
    run: Run, publish: Publish, snapshot: Snapshot
) -> None:
    published = publish(run)
    first = finish_run(run, published)
    before = snapshot()
    assert finish_run(run, published) == finish_run(run, {}) == first == WHOLE
    assert snapshot() == before


def test_drivers_that_commit_at_once_commit_once(
    store: Store, run: Run, publish: Publish, at_once: AtOnce
) -> None:
    published = publish(run)
    results = at_once(
        *(lambda known=known: finish_run(run, known) for known in (published, {}, {}))
    )
    assert results == [WHOLE] * 3
    assert kinds(store) == ["open", "commit"]


def test_a_driver_goes_on_where_another_died_before_the_log(
    store: Store, run: Run, publish: Publish, snapshot: Snapshot
) -> None:
    finish_run(run, publish(run))
    entry = store.read(entry_key(2))
    store.delete(entry_key(2))
    assert finish_run(run, {}) == WHOLE
    assert store.read(entry_key(2)) == entry


def test_a_commit_comes_after_whatever_is_in_the_log(
    store: Store, run: Run, publish: Publish, inputs: Inputs, begin: Begin
) -> None:
    published = publish(run)
    finish_run(run, published)
    begin(inputs("z"))  # the next run is open when this driver wakes up
    assert finish_run(run, published) == WHOLE
    assert kinds(store) == ["open", "commit", "open"]


# Parts of other drivers


def test_parts_of_other_drivers_are_read(
    store: Store, run: Run, publish: Publish, last_run: Callable[[], Run]
) -> None:
    publish(run, [0, 2], bad=["a"])
    totals = finish_run(run, publish(run, [1], bad=["d"]))
    assert totals == RunTotals(rows=8, ok=6, errors=2, parts=3, sealed=0)
    digests = [sha256(store.read(run.part_key(part))) for part in range(3)]
    assert read_manifest(last_run())["sha256"].to_pylist() == digests


def assert_refused(run: Run, part: int, what: str) -> None:
    with pytest.raises(ConflictError, match=f"{run.part_key(part)} {what}"):
        finish_run(run, {})
    assert kinds(run.store) == ["open"]
    assert run.store.head(run.manifest_key) is None


@pytest.mark.parametrize("data", [b"", b"hello, world", b"PAR1PAR1"])
def test_what_is_no_part_is_refused(run: Run, publish: Publish, data: bytes) -> None:
    publish(run)
    run.store.write(run.part_key(1), data)
    assert_refused(run, 1, "is not a part of a table of labels")


@pytest.mark.parametrize("cut", [1, 100])
def test_a_part_that_was_cut_off_is_refused(run: Run, publish: Publish, cut: int) -> None:
    publish(run)
    run.store.write(run.part_key(1), run.store.read(run.part_key(1))[:-cut])
    assert_refused(run, 1, "is not a part of a table of labels")


def test_parquet_of_somebody_else_is_refused(
    run: Run, publish: Publish, inputs: Inputs, label_rows: LabelRows
) -> None:
    publish(run)
    buffer = io.BytesIO()
    pq.write_table(label_rows(inputs(*"def")), buffer)
    run.store.write(run.part_key(1), buffer.getvalue())
    assert_refused(run, 1, "is not a part of a table of labels")


def test_another_part_of_the_run_is_refused(run: Run, publish: Publish) -> None:
    publish(run)
    run.store.write(run.part_key(1), run.store.read(run.part_key(0)))
    assert_refused(run, 1, f"is part 0 of run {run.id}")


def test_a_part_of_another_run_is_refused(
    run: Run, inputs: Inputs, label_rows: LabelRows, publish: Publish
) -> None:
    publish(run, [0, 2])
    write_part(run.store, run.part_key(1), label_rows(inputs(*"def")), run="another", part=1)
    assert_refused(run, 1, "is part 1 of run another")


@pytest.mark.parametrize(
    "images", ["de", "defg", ["d", "e", "not f"], "dfe", ["d", "e", ("f", "new")]]
)
def test_a_part_of_other_images_is_refused(
    run: Run, inputs: Inputs, label_rows: LabelRows, publish: Publish, images: Sequence[Any]
) -> None:
    publish(run, [0, 2])
    rows = label_rows(inputs(*images))
    write_part(run.store, run.part_key(1), rows, run=run.id, part=1)
    assert_refused(run, 1, "does not hold the images that were planned")


def test_a_part_whose_bytes_were_flipped_is_refused(run: Run, publish: Publish) -> None:
    publish(run)
    data = bytearray(run.store.read(run.part_key(1)))
    data[4:60] = bytes(56)  # within the first column
    run.store.write(run.part_key(1), bytes(data))
    assert_refused(run, 1, "is not a part of a table of labels, or damaged")


@dataclass
class RecordingStore:
    """A store, and the keys that were read from it, in order."""

    store: Store
    reads: list[str] = field(default_factory=list)

    def read(self, key: str) -> bytes:
        data = self.store.read(key)
        self.reads.append(key)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_a_plan_of_any_length_is_read_once_and_in_step_with_the_parts(
    store: Store,
    inputs: Inputs,
    begin: Begin,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "PIECE_ROWS", 3)  # a piece is a part
    run, _ = begin(inputs(*(f"k{n}" for n in range(60))))
    published = publish(run, [7, 8])
    publish(run)
    recording = RecordingStore(store)
    finish_run(replace(run, store=recording, plan=replace(run.plan, store=recording)), published)
    parts = [key for key in recording.reads if key.startswith("data/")]
    pieces = [key for key in recording.reads if key.startswith("_cnnray/plans/")]
    others = [part for part in range(20) if part not in published]
    assert sorted(parts) == [run.part_key(part) for part in others]
    assert pieces == [f"_cnnray/plans/{run.plan.pieces[part]}.parquet" for part in others]
    held = [1 if key in pieces else -1 for key in recording.reads if key in pieces + parts]
    assert max(itertools.accumulate(held)) == CHECK_THREADS


def test_parts_that_a_driver_has_written_are_not_read_again(
    store: Store, run: Run, publish: Publish
) -> None:
    published = publish(run)
    recording = RecordingStore(store)
    finish_run(replace(run, store=recording, plan=replace(run.plan, store=recording)), published)
    assert [key for key in recording.reads if not key.startswith("_cnnray/log/")] == []


# Publishing


def test_a_part_with_too_few_rows_is_a_mistake_of_the_driver(
    run: Run, inputs: Inputs, label_rows: LabelRows
) -> None:
    with pytest.raises(AssertionError):
        publish_part(run, 1, label_rows(inputs(*"de")))
    assert published_parts(run) == {}


# Manifests


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x"])
def test_a_manifest_that_was_changed_since_the_commit_is_named(
    store: Store,
    run: Run,
    publish: Publish,
    last_run: Callable[[], Run],
    damage: Callable[[bytes], bytes],
) -> None:
    finish_run(run, publish(run))
    store.write(run.manifest_key, damage(store.read(run.manifest_key)))
    with pytest.raises(ConflictError, match=f"{run.manifest_key} was changed since the commit"):
        read_manifest(last_run())


def test_a_manifest_that_is_none_is_refused_before_the_commit(run: Run, publish: Publish) -> None:
    published = publish(run)
    run.store.write(run.manifest_key, b"hello, world")
    with pytest.raises(ConflictError, match=f"{run.manifest_key} is not a manifest of run"):
        finish_run(run, published)
    assert kinds(run.store) == ["open"]


@pytest.fixture
def forge(run: Run, publish: Publish, last_run: Callable[[], Run]) -> Callable[..., bytes]:
    """Write the manifest of a run that is not committed, with changes to what it says of part 1."""

    def make(**changes: Any) -> bytes:
        finish_run(run, publish(run))
        records = read_manifest(last_run()).to_pylist()
        run.store.delete(entry_key(2))
        records[1] |= changes
        buffer = io.BytesIO()  # as another version of pyarrow may write it
        pq.write_table(pa.Table.from_pylist(records, PARTS_SCHEMA), buffer, compression="none")
        run.store.write(run.manifest_key, buffer.getvalue())
        return buffer.getvalue()

    return make


@pytest.mark.parametrize(
    "change",
    [{"part": 2}, {"rows": 0}, {"ok": 2}, {"errors": 1}, {"bytes": 7}, {"sha256": sha256(b"")}],
    ids=str,
)
def test_a_manifest_of_other_parts_is_refused_before_the_commit(
    run: Run, forge: Callable[..., bytes], change: dict[str, Any]
) -> None:
    forge(**change)
    with pytest.raises(ConflictError, match=f"{run.manifest_key} is not"):
        finish_run(run, {})
    assert kinds(run.store) == ["open"]


@pytest.mark.parametrize("change", [{}, {"path": "/mnt/labels/part"}, {"etag": "new"}], ids=str)
def test_the_same_parts_in_a_manifest_of_other_bytes_are_committed(
    run: Run, forge: Callable[..., bytes], last_run: Callable[[], Run], change: dict[str, Any]
) -> None:
    data = forge(**change)
    assert finish_run(run, {}) == WHOLE
    assert last_run().commit.manifest == sha256(data)
    assert change.items() <= read_manifest(last_run()).to_pylist()[1].items()


def test_a_manifest_without_a_column_is_refused(run: Run, forge: Callable[..., bytes]) -> None:
    manifest = pq.read_table(io.BytesIO(forge())).drop_columns(["path"])
    buffer = io.BytesIO()
    pq.write_table(manifest, buffer)
    run.store.write(run.manifest_key, buffer.getvalue())
    with pytest.raises(ConflictError, match=f"{run.manifest_key} is not a manifest of run"):
        finish_run(run, {})


@pytest.mark.parametrize("name", ["rows", "errors", "sealed"])
def test_a_log_with_other_sums_than_the_manifest_is_refused(
    store: Store, run: Run, publish: Publish, last_run: Callable[[], Run], name: str
) -> None:
    finish_run(run, publish(run))
    document = json.loads(store.read(entry_key(2)))
    store.write(entry_key(2), encode_json(document | {name: 800}))
    with pytest.raises(ConflictError, match=f"{run.manifest_key} has other sums"):
        read_manifest(last_run())


def test_totals_are_sums_over_the_parts() -> None:
    numbers = [(3, 2, 1), (0, 0, 0), (2, 2, 0), (0, 0, 0)]
    manifest = pa.table(
        {name: [part[n] for part in numbers] for n, name in enumerate(("rows", "ok", "errors"))}
    )
    assert read_totals(manifest) == RunTotals(rows=5, ok=4, errors=1, parts=4, sealed=2)


def test_labelled_are_the_inputs_of_a_committed_run(
    run: Run, publish: Publish, last_run: Callable[[], Run], inputs: Inputs
) -> None:
    finish_run(run, publish(run))
    assert pa.concat_tables(labelled_inputs(last_run())).equals(inputs(*"abcdefgh"))


# Sealing


def test_sealing_ends_a_run_with_what_is_there(
    store: Store, run: Run, publish: Publish, last_run: Callable[[], Run]
) -> None:
    publish(run, [1], bad=["e"])
    there = store.read(run.part_key(1))
    assert seal_run(run, NOTHING) == RunTotals(rows=3, ok=2, errors=1, parts=3, sealed=2)
    assert kinds(store) == ["open", "commit"]
    assert store.read(run.part_key(1)) == there
    assert read_manifest(last_run())["rows"].to_pylist() == [0, 3, 0]
    assert keys_of(labelled_inputs(last_run())) == ["d", "e", "f"]


def test_a_run_that_nobody_has_worked_on_can_be_sealed(
    run: Run, last_run: Callable[[], Run]
) -> None:
    assert seal_run(run, NOTHING) == RunTotals(rows=0, ok=0, errors=0, parts=3, sealed=3)
    assert list(labelled_inputs(last_run())) == []


def test_sealing_a_whole_run_commits_it(run: Run, publish: Publish) -> None:
    publish(run)
    assert seal_run(run, NOTHING) == WHOLE


def test_sealing_twice_is_sealing_once(run: Run, publish: Publish, snapshot: Snapshot) -> None:
    publish(run, [0])
    first = seal_run(run, NOTHING)
    before = snapshot()
    assert seal_run(run, NOTHING) == first
    assert snapshot() == before


def test_a_driver_that_sleeps_through_the_sealing_publishes_nothing(
    run: Run, publish: Publish, snapshot: Snapshot
) -> None:
    published = publish(run, [0])
    totals = seal_run(run, NOTHING)
    before = snapshot()
    assert publish(run, [1, 2]) == {}
    assert finish_run(run, published) == totals
    assert snapshot() == before


def test_of_a_sealing_and_a_driver_at_once_each_part_is_of_one(
    run: Run, publish: Publish, at_once: AtOnce, last_run: Callable[[], Run]
) -> None:
    sealed, driven = at_once(lambda: seal_run(run, NOTHING), lambda: finish_run(run, publish(run)))
    assert sealed == driven
    assert kinds(run.store) == ["open", "commit"]
    rows = read_manifest(last_run())["rows"].to_pylist()
    assert all(count in (0, run.plan.rows_of(part)) for part, count in enumerate(rows))
