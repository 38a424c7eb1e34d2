"""A table of labels as a Delta table, too: a log beside ``data/`` that names the same files.

Each committed run is one commit there, with an application transaction: the table by the digest of
its first log entry, the run by the number of the entry that committed it. So a run that is there is
seen to be there, whoever added it, and what a killed driver left out is found by the next one.
Nothing is copied, and parts without rows are left out. https://github.com/delta-io/delta/blob/master/PROTOCOL.md

``deltalake`` writes that log by a client of its own, with the credentials of the AWS environment
and, like ``Store.create``, by conditional writes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import ConflictError, IncompleteError, SettingsError, StorageError
from cnnray.labeling.commit import Run, read_manifest
from cnnray.labeling.log import MAX_RACES, logged_runs, read_log
from cnnray.labeling.runs import read_run
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import Store
from cnnray.storage.replies import reason
from cnnray.storage.retry import OBJECT_SECONDS

if TYPE_CHECKING:
    from deltalake import DeltaTable

RUN_COLUMN = "run"
"""The partition: in the path of a part, as Hive writes it, and so not in the file."""

DELTA_SCHEMA = LABELS_SCHEMA.append(pa.field(RUN_COLUMN, pa.string(), nullable=False))
"""Embeddings are left out: Delta has no float16."""

CONFIGURATION: dict[str, str | None] = {
    "delta.appendOnly": "true",
    # A vacuum would delete the parts of an open run and those without rows, which Delta never saw.
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.enableExpiredLogCleanup": "false",  # the driver's key may be denied to delete
}
STORAGE_OPTIONS = {
    "conditional_put": "etag",
    "allow_http": "true",  # where the address in the environment is one
    "aws_force_credential_load": "true",  # those of a profile, too
    "max_retries": "100",
    "retry_timeout": f"{OBJECT_SECONDS:.0f}s",
}
"""For S3, besides what the environment says."""
COLOUR = re.compile(r"\x1b\[[\d;]*m")
"""In the text of deltalake's errors."""


def check_delta(store: Store) -> None:
    """Raise unless a table of labels at ``store`` can be a Delta table as well. Writes nothing.

    ``SettingsError`` without the package, and for a name that Delta's readers do not find;
    ``ConflictError`` for a Delta table of somebody else's; ``StorageError``.
    """
    if importlib.util.find_spec("deltalake") is None:
        raise SettingsError(
            "--delta needs the package deltalake",
            hint="install the delta extra: pip install '.[delta]'",
        )
    if quote(store.uri, safe="/:=") != store.uri:
        raise SettingsError(
            f"--delta: readers of Delta do not find {store.uri!r}",
            hint="choose an --output of letters, digits and . _ - ~ = alone",
        )
    from deltalake import DeltaTable

    with _named_errors(f"cannot read the Delta log of {store.uri}", StorageError):
        if DeltaTable.is_deltatable(store.uri, STORAGE_OPTIONS):
            _require_ours(DeltaTable(store.uri, storage_options=STORAGE_OPTIONS), store)


def export_runs(store: Store) -> int:
    """Add to the Delta table every committed run that it lacks, oldest first; their number.

    Safe to repeat, and by several drivers at once. Raises ``ConflictError`` as ``check_delta`` and
    ``read_manifest`` do, ``IncompleteError`` when the Delta log cannot be written: then the labels
    are there all the same, and the next export adds them.
    """
    entries = read_log(store)
    runs = logged_runs(store, entries)
    if not any(logged.commit for logged in runs):
        return 0
    application = entries[0].digest
    with _named_errors(
        f"the labels in {store.uri} are committed, but its Delta table lacks some",
        IncompleteError,
        hint="submit the same command again: it adds them",
    ):
        table = _open_table(store)
        done = table.transaction_version(application) or 0
        added = 0
        for place, logged in enumerate(runs, 1):
            version = 2 * place  # the number of the entry that commits: another opens each run
            # A run of which an abort sealed every part has nothing to add.
            if logged.commit and logged.commit.rows and version > done:
                added += _add_run(table, read_run(store, logged), application, version=version)
        return added


def _open_table(store: Store) -> DeltaTable:
    """The Delta table, made if there is none."""
    from deltalake import DeltaTable
    from deltalake.exceptions import CommitFailedError

    for races_left in reversed(range(MAX_RACES)):
        try:
            table = DeltaTable.create(
                store.uri,
                DELTA_SCHEMA,
                mode="ignore",
                partition_by=[RUN_COLUMN],
                name="labels",
                configuration=CONFIGURATION,
                storage_options=STORAGE_OPTIONS,
            )
            break
        except CommitFailedError:  # another driver makes it
            if not races_left:
                raise
    _require_ours(table, store)
    return table


def _require_ours(table: DeltaTable, store: Store) -> None:
    from deltalake import Schema

    if table.schema() != Schema.from_arrow(DELTA_SCHEMA):
        raise ConflictError(
            f"{store.uri}/_delta_log is of a table of another kind", hint="choose another --output"
        )


def _add_run(table: DeltaTable, run: Run, application: str, *, version: int) -> bool:
    """Add the parts of a run in one commit; False when another driver has."""
    from deltalake import CommitProperties, Transaction
    from deltalake.exceptions import CommitFailedError

    transaction = Transaction(application, version)
    parts = list(_add_actions(run))
    for races_left in reversed(range(MAX_RACES)):
        table.update_incremental()
        if (table.transaction_version(application) or 0) >= version:
            return False
        try:
            table.create_write_transaction(
                parts,
                "append",
                table.schema(),
                [RUN_COLUMN],
                commit_properties=CommitProperties(app_transactions=[transaction]),
            )
            break
        except CommitFailedError:  # another driver was first, perhaps with this very run
            if not races_left:
                raise
    return True


def _add_actions(run: Run) -> Iterator[Any]:
    from deltalake.transaction import AddAction

    manifest = read_manifest(run)
    now = int(time.time() * 1000)  # for people: nothing reads it
    for part in manifest.filter(pc.greater(manifest["rows"], 0)).to_pylist():
        yield AddAction(
            path=run.part_key(part["part"]),
            size=part["bytes"],
            partition_values={RUN_COLUMN: run.id},
            modification_time=now,
            data_change=True,
            stats=json.dumps({"numRecords": part["rows"]}),
        )


@contextlib.contextmanager
def _named_errors(
    what: str, kind: type[StorageError | IncompleteError], hint: str | None = None
) -> Iterator[None]:
    """Raise deltalake's errors in one line."""
    from deltalake.exceptions import DeltaError

    try:
        yield
    except (DeltaError, OSError) as error:
        text = reason(OSError(COLOUR.sub("", str(error))))
        raise kind(f"{what}: {text}", hint=hint) from error
