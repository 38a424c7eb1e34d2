"""The log: one order of entries for all drivers, and a chain that shows what was changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from cnnray.errors import ConflictError
from cnnray.labeling.log import (
    Commit,
    LogEntry,
    LoggedRun,
    append_entry,
    entry_key,
    logged_runs,
    read_log,
)
from cnnray.storage import Store, encode_json, sha256


def write_log(store: Store, count: int) -> list[LogEntry]:
    """A log of some entries, as one driver writes it."""
    for number in range(1, count + 1):
        assert append_entry(store, read_log(store), {"kind": "open", "run": f"{number}"})
    return read_log(store)


def test_a_table_that_is_not_there_has_no_entries(store: Store) -> None:
    assert read_log(store) == []


def test_entries_are_read_as_they_were_written(store: Store) -> None:
    entries = write_log(store, 12)  # 12: in the order of numbers, where "10" is after "9"
    assert [entry.number for entry in entries] == list(range(1, 13))
    assert [entry.document["run"] for entry in entries] == [f"{n}" for n in range(1, 13)]
    assert [entry.digest for entry in entries] == [
        sha256(store.read(entry_key(entry.number))) for entry in entries
    ]


def test_each_entry_names_the_one_before(store: Store) -> None:
    entries = write_log(store, 3)
    named = [entry.document["previous"] for entry in entries]
    assert named == [None, entries[0].digest, entries[1].digest]


def test_who_comes_second_gets_false_and_the_first_entry_stays(store: Store) -> None:
    seen = write_log(store, 1)
    assert append_entry(store, seen, {"kind": "open", "run": "first"})
    assert not append_entry(store, seen, {"kind": "open", "run": "second"})
    assert [entry.document["run"] for entry in read_log(store)] == ["1", "first"]


def test_an_entry_that_was_written_before_the_reply_was_lost_is_appended(store: Store) -> None:
    seen = write_log(store, 1)
    assert append_entry(store, seen, {"kind": "open", "run": "mine"})
    assert append_entry(store, seen, {"kind": "open", "run": "mine"})
    assert len(read_log(store)) == 2


def test_drivers_at_once_append_every_entry_once(
    store: Store, at_once: Callable[..., list[Any]]
) -> None:
    def drive(name: str) -> None:
        for number in range(4):
            while not append_entry(store, read_log(store), {"run": f"{name}{number}"}):
                pass

    assert at_once(*(lambda name=name: drive(name) for name in "abc")) == [None] * 3
    runs = [entry.document["run"] for entry in read_log(store)]
    assert sorted(runs) == [f"{name}{number}" for name in "abc" for number in range(4)]
    assert [run for run in runs if run[0] == "a"] == ["a0", "a1", "a2", "a3"]


def assert_refused(store: Store, number: int, what: str) -> None:
    with pytest.raises(ConflictError, match=f"{re.escape(entry_key(number))} {what}"):
        read_log(store)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flipped_byte_is_noticed_by_the_entry_after_it(store: Store, number: int) -> None:
    write_log(store, 4)
    data = store.read(entry_key(number))
    store.write(entry_key(number), data.replace(b'"open"', b'"opeN"'))
    assert_refused(store, number + 1, "does not follow the entry before it")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_removed_entry_is_named(store: Store, number: int) -> None:
    write_log(store, 4)
    store.delete(entry_key(number))
    assert_refused(store, number, "is missing")


def test_an_entry_that_another_has_replaced_is_noticed(store: Store) -> None:
    entries = write_log(store, 3)
    other = {"previous": entries[0].digest, "kind": "open", "run": "other"}
    store.write(entry_key(2), encode_json(other))
    assert_refused(store, 3, "does not follow the entry before it")


def test_entries_that_changed_places_are_noticed(store: Store) -> None:
    write_log(store, 3)
    second, third = store.read(entry_key(2)), store.read(entry_key(3))
    store.write(entry_key(2), third)
    store.write(entry_key(3), second)
    assert_refused(store, 2, "does not follow the entry before it")


def test_a_fork_is_noticed(store: Store) -> None:
    entries = write_log(store, 2)
    branch = {"previous": entries[0].digest, "kind": "open", "run": "branch"}
    store.write(entry_key(3), encode_json(branch))
    assert_refused(store, 3, "does not follow the entry before it")


def test_a_second_first_entry_is_noticed(store: Store) -> None:
    write_log(store, 2)
    store.write(entry_key(3), encode_json({"previous": None, "kind": "open", "run": "again"}))
    assert_refused(store, 3, "does not follow the entry before it")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[]", b"7", b"null", b'"previous"', b'{"kind": "open"}']
)
def test_what_is_no_entry_is_named(store: Store, data: bytes) -> None:
    write_log(store, 1)
    store.write(entry_key(2), data)
    assert_refused(store, 2, "is not an entry of the log")


def test_a_file_that_is_not_of_the_log_is_not_passed_over(store: Store) -> None:
    write_log(store, 2)
    store.write("_cnnray/log/00000000000000000001.json.bak", b"{}")
    with pytest.raises(ConflictError, match="log of this table was changed"):
        read_log(store)


def test_an_entry_that_nests_without_end_is_named(store: Store) -> None:
    write_log(store, 1)
    store.write(entry_key(2), b"[" * 200_000)
    assert_refused(store, 2, "is not an entry of the log")


def test_the_hint_is_to_restore_the_object(store: Store) -> None:
    write_log(store, 2)
    store.delete(entry_key(1))
    with pytest.raises(ConflictError, match="hint: restore the object"):
        read_log(store)


# What the entries say


def opened(run: str) -> dict[str, Any]:
    return {"kind": "open", "run": run, "plan": f"plan of {run}", "config": {"input": "photos"}}


def committed(run: str) -> dict[str, Any]:
    numbers = {"rows": 8, "errors": 1, "sealed": 2}
    return {"kind": "commit", "run": run, "manifest": f"manifest of {run}", **numbers}


def runs_of(store: Store, *documents: dict[str, Any]) -> list[LoggedRun]:
    """The runs of a log of these entries."""
    for document in documents:
        append_entry(store, read_log(store), document)
    return logged_runs(store, read_log(store))


def test_a_log_without_entries_has_no_runs(store: Store) -> None:
    assert runs_of(store) == []


def test_runs_are_opened_and_committed_in_turn(store: Store) -> None:
    assert runs_of(store, opened("a"), committed("a"), opened("b")) == [
        LoggedRun(
            id="a",
            plan="plan of a",
            config={"input": "photos"},
            commit=Commit(manifest="manifest of a", rows=8, errors=1, sealed=2),
        ),
        LoggedRun(id="b", plan="plan of b", config={"input": "photos"}),
    ]


@pytest.mark.parametrize(
    "documents",
    [
        [committed("a")],
        [opened("a"), opened("b")],
        [opened("a"), committed("b")],
        [opened("a"), committed("a"), committed("a")],
        [{}],
        [opened("a") | {"kind": "opem"}],
        [opened("a") | {"config": []}],
        *([opened("a") | {name: None}] for name in ("kind", "run", "plan", "config")),
        *([opened("a"), committed("a") | {name: None}] for name in committed("a")),
    ],
)
def test_an_entry_that_no_driver_writes_there_is_named(
    store: Store, documents: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConflictError, match=rf"{entry_key(len(documents))} .*\nhint: restore"):
        runs_of(store, *documents)


def test_an_entry_is_json_with_readable_names(store: Store) -> None:
    append_entry(store, [], {"kind": "open", "config": {"input": "Fotos/ä\n猫"}})
    assert "ä\\n猫" in store.read(entry_key(1)).decode()
    assert json.loads(store.read(entry_key(1)))["config"] == {"input": "Fotos/ä\n猫"}
