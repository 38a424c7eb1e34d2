"""The runs of a table: whose table it is, which run is open, what a new one has to label.

Several drivers may go through this at once, and any of them may die or sleep anywhere. What they
share is the store, which lets one create of an object succeed: the log has one next entry, a part
one content. A driver that loses reads what won and goes on from there.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import pyarrow as pa

from cnnray.errors import (
    AlreadyExistsError,
    ConflictError,
    IncompleteError,
    MissingObjectError,
    StorageError,
)
from cnnray.labeling.commit import Run, labelled_inputs
from cnnray.labeling.crash_points import crash_point
from cnnray.labeling.ledger import (
    ChangePolicy,
    Ledger,
    Selection,
    join_ledgers,
    make_ledger,
    select_new,
)
from cnnray.labeling.log import (
    MAX_RACES,
    LogEntry,
    LoggedRun,
    append_entry,
    logged_runs,
    read_log,
)
from cnnray.labeling.plan import DATA_FOLDER, read_plan, write_plan
from cnnray.schema import LABELS_VERSION
from cnnray.storage import Store, encode_json, read_json

TABLE_KEY = "_cnnray/table.json"
PROBE_KEY = "_cnnray/probe"

READ_THREADS = 8
"""Runs whose plans are read at a time: a table that grows nightly has hundreds of small ones."""


def claim_table(store: Store, identity: Mapping[str, Any]) -> None:
    """Make this the table of ``identity`` (one model), or check that it is.

    Raises ``ConflictError`` for another identity (a new model is a new table, never a mixture) and
    ``StorageError`` for a store that could not keep two drivers apart.
    """
    if has_table(store, identity):
        return
    if not store.refuses_overwrite(PROBE_KEY):
        raise StorageError(
            f"{store.uri} does not refuse to overwrite: it has no conditional writes",
            hint="use another store, or --single_writer when nobody else writes there",
        )
    try:
        store.create(TABLE_KEY, encode_json(_document(identity)))
    except AlreadyExistsError:  # another driver was first
        has_table(store, identity)


def has_table(store: Store, identity: Mapping[str, Any]) -> bool:
    """Whether the table of ``identity`` is there. Writes nothing.

    Raises ``ConflictError`` when something else is there.
    """
    wanted = _document(identity)
    try:
        found = _read_identity(store)
    except MissingObjectError:
        _refuse_foreign_data(store)
        return False
    if found != wanted:
        differences = ", ".join(
            f"{name} {found.get(name)!r}, here {wanted.get(name)!r}"
            for name in wanted | found
            if found.get(name) != wanted.get(name)
        )
        raise ConflictError(
            f"{store.uri} holds labels of another kind: {differences}",
            hint="choose another --output: a new model is a new table",
        )
    return True


def _document(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": LABELS_VERSION, **identity}


def _read_identity(store: Store) -> dict[str, Any]:
    identity = read_json(store, TABLE_KEY)
    if not isinstance(identity, dict):
        raise ConflictError(
            f"{store.uri}/{TABLE_KEY} was changed: it does not say whose table this is",
            hint="restore the object from a version of the bucket, or choose another --output",
        )
    return identity


def _refuse_foreign_data(store: Store) -> None:
    try:
        found = next(store.list(f"{DATA_FOLDER}/"), None)
    except MissingObjectError:
        return
    if found is not None:
        raise ConflictError(
            f"{store.uri}/{found.key} is there, but not {TABLE_KEY}: no table of cnnray's",
            hint="choose another --output",
        )


def read_run(store: Store, logged: LoggedRun) -> Run:
    """A run of the log with its plan. Raises what ``read_plan`` does."""
    plan = read_plan(store, logged.plan)
    return Run(store=store, id=logged.id, plan=plan, config=logged.config, commit=logged.commit)


def read_runs(store: Store, entries: Sequence[LogEntry]) -> list[Run]:
    """The runs of a log, oldest first; only the last one can be open.

    Raises what ``logged_runs`` and ``read_plan`` do.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda run: read_run(store, run), logged_runs(store, entries)))


def begin_run(
    store: Store,
    *,
    config: Mapping[str, Any],
    list_inputs: Callable[[], Iterable[pa.Table]],
    part_rows: int,
    on_changed: ChangePolicy,
) -> tuple[Run, bool] | None:
    """The run to work on, and whether this driver has opened it; None when nothing is new.

    An open run with the same ``config`` is joined. Raises ``ConflictError`` for one with another
    config.
    """
    is_mine = False
    for _ in range(MAX_RACES):
        entries = read_log(store)
        runs = read_runs(store, entries)
        if is_mine and runs[-1].commit is not None:  # somebody finished it before we came to look
            return runs[-1], is_mine
        with tempfile.TemporaryFile(prefix="cnnray-") as spill:
            work = find_work(
                runs, config=config, list_inputs=list_inputs, on_changed=on_changed, spill=spill
            )
            if isinstance(work, Run):
                return work, is_mine
            if not work.rows:
                return None
            plan = write_plan(store, work.tables(), part_rows=part_rows, duplicates=work.duplicates)
        now = datetime.datetime.now(datetime.UTC)  # for people: nothing reads it
        document = {
            "kind": "open",
            "run": f"{len(entries) + 1:08d}-{now:%Y%m%dT%H%M%SZ}-{plan.digest[:8]}",
            "plan": plan.digest,
            "config": dict(config),
        }
        crash_point("log.before_open")
        is_mine = append_entry(store, entries, document)
        crash_point("log.after_open")
    raise IncompleteError(f"other drivers were {MAX_RACES} times faster at {store.uri}")


def find_work(
    runs: Sequence[Run],
    *,
    config: Mapping[str, Any],
    list_inputs: Callable[[], Iterable[pa.Table]],
    on_changed: ChangePolicy,
    spill: IO[bytes],
) -> Run | Selection:
    """What a driver that comes now has to do: the open run, or what is new. Writes nothing.

    ``spill`` is an empty file for the listing. Raises ``ConflictError`` for an open run that has
    another ``config``.
    """
    if runs and runs[-1].commit is None:
        _require_same_config(runs[-1], config)
        return runs[-1]
    return select_new(list_inputs(), read_ledger(runs), on_changed=on_changed, spill=spill)


def read_ledger(runs: Sequence[Run]) -> Ledger:
    """What the committed runs have labelled."""
    committed = [run for run in runs if run.commit is not None]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return join_ledgers(pool.map(lambda run: make_ledger(labelled_inputs(run)), committed))


def _require_same_config(run: Run, config: Mapping[str, Any]) -> None:
    differences = [
        f"--{name} {run.config.get(name)}, here {config.get(name)}"
        for name in sorted({*run.config, *config})
        if run.config.get(name) != config.get(name)
    ]
    if differences:
        raise ConflictError(
            f"run {run.id} is open with other settings: {', '.join(differences)}",
            hint="finish it with its own settings, or end it: jobs/verify.py --output … --abort",
        )
