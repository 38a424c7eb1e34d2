"""The Delta table over the files of a table of labels: every committed row once, whoever dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cnnray.errors import ConflictError, IncompleteError, SettingsError
from cnnray.labeling import delta
from cnnray.labeling.commit import Run, finish_run, publish_part, seal_run
from cnnray.labeling.delta import check_delta, export_runs
from cnnray.labeling.log import read_log
from cnnray.labeling.verify import verify_table
from cnnray.schema import LABELS_SCHEMA, labels_schema
from cnnray.storage import S3Store, Store, open_store

Inputs = Callable[..., pa.Table]
LabelAll = Callable[..., Run]
Begin = Callable[..., tuple[Run, bool]]
Publish = Callable[..., Any]

ROOT = Path(__file__).parents[2]
S3_OPTIONS = {"allow_http": "true"}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["local", pytest.param("seaweed", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Where a table of labels will be, on disk and in a bucket; nothing is there yet."""
    if request.param == "local":
        return open_store(str(tmp_path / "labels"))
    seaweed = request.getfixturevalue("seaweed")
    return S3Store(bucket=seaweed.bucket, prefix=f"{tmp_path.name}-{time.time_ns()}/labels")


def open_delta(store: Store) -> DeltaTable:
    """The Delta table as a stranger opens it."""
    return DeltaTable(store.uri, storage_options=S3_OPTIONS)


def rows_of(store: Store) -> list[tuple[str, str]]:
    """The key and label of every row that a reader of Delta sees."""
    rows = open_delta(store).to_pyarrow_table(columns=["key", "label"]).to_pylist()
    return sorted((row["key"], row["label"]) for row in rows)


def actions_of(store: Store, kind: str) -> list[dict[str, Any]]:
    """Every action of a kind in the Delta log, in the order of its commits."""
    keys = sorted(item.key for item in store.list("_delta_log/") if item.key.endswith(".json"))
    lines = [json.loads(line) for key in keys for line in store.read(key).splitlines()]
    return [line[kind] for line in lines if kind in line]


def files_of(store: Store) -> dict[str, tuple[int, str]]:
    return {item.key: (item.size, item.etag) for item in store.list()}


# What is there


def test_a_committed_run_is_in_the_delta_table_and_no_file_is_copied(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    run = label_all(inputs(*"abcdefgh"), bad=["b"])
    before = files_of(store)
    assert export_runs(store) == 1
    assert rows_of(store) == [(key, None if key == "b" else "cat") for key in "abcdefgh"]
    after = files_of(store)
    assert {key: after[key] for key in before} == before
    assert all(key.startswith("_delta_log/") for key in after.keys() - before.keys())
    adds = actions_of(store, "add")
    assert [add["path"] for add in adds] == [run.part_key(part) for part in range(3)]
    assert [add["size"] for add in adds] == [before[run.part_key(part)][0] for part in range(3)]
    proof = verify_table(store)
    assert (proof.problems, proof.rows) == ([], 8)


def test_polars_duckdb_and_arrow_read_the_same_rows_with_their_runs(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    import duckdb
    import polars

    runs = [label_all(inputs(*"abcd")), label_all(inputs(*"abcdef"))]
    export_runs(store)
    expected = {runs[0].id: 4, runs[1].id: 2}
    table = open_delta(store)
    assert Counter(table.to_pyarrow_table()["run"].to_pylist()) == expected
    frame = polars.read_delta(store.uri, storage_options=S3_OPTIONS)
    assert Counter(frame["run"].to_list()) == expected
    assert frame.schema.names() == [*LABELS_SCHEMA.names, "run"]
    labels = table.to_pyarrow_dataset()
    found = duckdb.sql("SELECT run, count(*) FROM labels GROUP BY run").fetchall()
    assert labels is not None
    assert dict(found) == expected
    assert table.count() == 6  # by the numbers of rows in the log


def test_each_run_is_one_version_and_a_run_again_adds_nothing(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    label_all(inputs(*"abcd"))
    assert export_runs(store) == 1
    label_all(inputs(*"abcdef"))
    assert export_runs(store) == 1
    before = files_of(store)
    assert export_runs(store) == 0
    assert files_of(store) == before
    assert len(actions_of(store, "add")) == 3
    assert open_delta(store).version() == 2  # 0 is the empty table
    transactions = [(said["appId"], said["version"]) for said in actions_of(store, "txn")]
    table = read_log(store)[0].digest
    assert transactions == [(table, 2), (table, 4)]


def test_parts_that_were_sealed_are_left_out(
    store: Store, inputs: Inputs, label_all: LabelAll, begin: Begin, publish: Publish
) -> None:
    run, _ = begin(inputs(*"abcdefgh"))
    publish(run, [1])
    seal_run(run, LABELS_SCHEMA.empty_table())
    assert export_runs(store) == 1
    assert [add["path"] for add in actions_of(store, "add")] == [run.part_key(1)]
    run, _ = begin(inputs(*"abc"))
    seal_run(run, LABELS_SCHEMA.empty_table())
    assert export_runs(store) == 0  # a run without any row
    label_all(inputs(*"abcdefgh"))
    assert export_runs(store) == 1
    assert [key for key, _ in rows_of(store)] == list("abcdefgh")


def test_embeddings_which_delta_has_no_type_for_are_left_out(
    store: Store, inputs: Inputs, label_rows: Callable[..., pa.Table], begin: Begin
) -> None:
    run, _ = begin(inputs("a", "b"))
    [(part, planned)] = run.plan.read_parts([0])
    rows = [row | {"embedding": [0.5, 1.0]} for row in label_rows(planned).to_pylist()]
    publish_part(run, part, pa.Table.from_pylist(rows, labels_schema(embeddings=True)))
    finish_run(run, {})
    assert export_runs(store) == 1
    assert rows_of(store) == [("a", "cat"), ("b", "cat")]
    assert "embedding" not in open_delta(store).to_pyarrow_table().column_names


# What may happen on the way


def test_a_run_that_is_not_committed_is_not_there(
    store: Store, inputs: Inputs, begin: Begin, publish: Publish
) -> None:
    assert export_runs(store) == 0
    run, _ = begin(inputs(*"abcdef"))
    publish(run)
    assert export_runs(store) == 0
    assert not DeltaTable.is_deltatable(store.uri, S3_OPTIONS)


def test_runs_whose_drivers_died_before_the_export_are_added_by_the_next_one(
    store: Store, inputs: Inputs, label_all: LabelAll, begin: Begin
) -> None:
    label_all(inputs(*"abcd"))
    label_all(inputs(*"abcdef"))
    assert begin(inputs(*"abcdef")) is None  # nothing is new
    assert export_runs(store) == 2
    assert [key for key, _ in rows_of(store)] == list("abcdef")


def test_a_driver_that_dies_between_two_runs_is_followed_by_one_that_adds_the_second(
    store: Store, inputs: Inputs, label_all: LabelAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [label_all(inputs(*"abcd")), label_all(inputs(*"abcdef"))]
    add_run = delta._add_run

    def mortal(table: DeltaTable, run: Run, *options: Any, **more: Any) -> bool:
        if run.id == runs[1].id:
            raise KeyboardInterrupt
        return add_run(table, run, *options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(delta, "_add_run", mortal)
        with pytest.raises(KeyboardInterrupt):
            export_runs(store)
    assert [key for key, _ in rows_of(store)] == list("abcd")
    assert export_runs(store) == 1
    assert [key for key, _ in rows_of(store)] == list("abcdef")


def test_a_commit_whose_reply_is_lost_is_said_so_and_not_made_twice(
    store: Store, inputs: Inputs, label_all: LabelAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_all(inputs(*"abcd"))
    write = DeltaTable.create_write_transaction

    def lose_reply(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise OSError("connection reset\x1b[31m")

    with monkeypatch.context() as patch:
        patch.setattr(DeltaTable, "create_write_transaction", lose_reply)
        with pytest.raises(IncompleteError) as caught:
            export_runs(store)
    said, hint = str(caught.value).splitlines()
    assert said.endswith("its Delta table lacks some: connection reset")
    assert hint == "hint: submit the same command again: it adds them"
    assert export_runs(store) == 0
    assert [key for key, _ in rows_of(store)] == list("abcd")


def test_drivers_that_export_at_once_add_each_run_once(
    store: Store, inputs: Inputs, label_all: LabelAll, at_once: Callable[..., list[Any]]
) -> None:
    keys = "abcdefghijkl"
    runs = [label_all(inputs(*keys[: 4 * count])) for count in (1, 2, 3)]
    added = at_once(*[lambda: export_runs(store)] * 4)
    assert sum(added) == 3
    assert [key for key, _ in rows_of(store)] == list(keys)
    paths = [add["path"] for add in actions_of(store, "add")]
    assert paths == [run.part_key(part) for run in runs for part in range(2)]


@pytest.mark.s3
@pytest.mark.parametrize("store", ["seaweed"], indirect=True)
def test_the_credentials_of_a_profile_are_used(
    store: Store,
    seaweed: Any,
    inputs: Inputs,
    label_all: LabelAll,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    label_all(inputs("a"))
    keys = (f"aws_{name}={value}" for name, value in seaweed_keys(seaweed).items())
    (tmp_path / "credentials").write_text("\n".join(["[labels]", *keys]))
    with monkeypatch.context() as patch:
        for name in seaweed_keys(seaweed):
            patch.delenv(f"AWS_{name.upper()}")
        patch.setenv("AWS_PROFILE", "labels")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        assert export_runs(store) == 1
    assert rows_of(store) == [("a", "cat")]


def seaweed_keys(seaweed: Any) -> dict[str, str]:
    return {"access_key_id": seaweed.access_key, "secret_access_key": seaweed.secret_key}


# Mistakes


def test_without_the_package_it_is_said_before_anything_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(SettingsError) as caught:
        check_delta(store)
    assert str(caught.value).splitlines() == [
        "--delta needs the package deltalake",
        "hint: install the delta extra: pip install '.[delta]'",
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["my labels", "100%25", "labels#2", "étiquettes", "a?b", "a+b"])
def test_a_name_that_readers_of_delta_do_not_find_is_refused(tmp_path: Path, name: str) -> None:
    for uri in (f"{tmp_path}/{name}", f"s3://bucket/{name}"):
        with pytest.raises(SettingsError, match="readers of Delta do not find .*\nhint: choose"):
            check_delta(open_store(uri))


def test_a_delta_table_of_somebody_elses_is_refused_and_left_alone(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    theirs = pa.schema([pa.field("x", pa.int64())])
    DeltaTable.create(store.uri, theirs, storage_options=S3_OPTIONS)
    label_all(inputs("a"))
    for attempt in (check_delta, export_runs):
        with pytest.raises(ConflictError, match="_delta_log is of a table of another kind"):
            attempt(store)
    assert len(actions_of(store, "commitInfo")) == 1


def test_a_table_that_is_ours_or_not_there_yet_passes_the_check(
    store: Store, inputs: Inputs, label_all: LabelAll
) -> None:
    check_delta(store)
    label_all(inputs("a"))
    export_runs(store)
    before = files_of(store)
    check_delta(store)
    assert files_of(store) == before


def test_users_of_delta_cannot_delete_what_delta_does_not_know(
    store: Store, inputs: Inputs, label_all: LabelAll, begin: Begin, publish: Publish
) -> None:
    label_all(inputs(*"abc"))
    export_runs(store)
    run, _ = begin(inputs(*"abcdef"))
    publish(run)  # not committed: no file of Delta's
    table = open_delta(store)
    with pytest.raises(DeltaError, match="Invalid retention period"):
        table.vacuum(retention_hours=24 * 365, dry_run=False)
    with pytest.raises(DeltaError, match="append-only"):
        table.delete()
    finish_run(run, {})
    assert export_runs(store) == 1
    assert verify_table(store).problems == []


def test_the_package_is_not_loaded_until_it_is_used() -> None:
    code = "import sys, cnnray.labeling.delta; print({'deltalake', 'ray'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "set()\n", done.stderr


# The README


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_the_latest_view_of_the_readme_has_the_newest_row_of_each_key(
    store: Store, inputs: Inputs, label_all: LabelAll, tmp_path: Path, monkeypatch: Any
) -> None:
    import duckdb

    label_all(inputs(("a", "1"), ("b", "1")))
    label_all(inputs(("a", "2"), ("b", "1"), ("c", "1")))
    export_runs(store)
    (tmp_path / "work").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    [block] = [block for block in blocks if "latest" in block]
    exec(block, {})
    found = duckdb.sql("SELECT key, etag FROM latest ORDER BY key").fetchall()
    assert found == [("a", "2"), ("b", "1"), ("c", "1")]
