"""The log of a table: what was opened and committed, in order, each entry naming the one before.

An entry is written by one conditional create of the next number, so of several drivers that want to
append one succeeds, and the others read what it wrote. Nothing in the log is ever changed; a chain
of digests shows when something was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cnnray.datasets.sources.base import read_each
from cnnray.errors import AlreadyExistsError, ConflictError, MissingObjectError, StorageError
from cnnray.storage import Store, decode_json, encode_json, sha256

LOG_FOLDER = "_cnnray/log"
NUMBER_DIGITS = 20

MAX_RACES = 20
"""Times that a driver may lose to others before it gives up; each loss is another's progress."""


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry: its number (from 1), the SHA-256 of its bytes, and what it says."""

    number: int
    digest: str
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Commit:
    """How a run ended: the digest of its manifest, and sums over it."""

    manifest: str
    rows: int
    errors: int
    sealed: int  # parts


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """What the log says of a run: its plan by digest, and its end unless it is open."""

    id: str
    plan: str
    config: Mapping[str, Any]
    commit: Commit | None = None


def entry_key(number: int) -> str:
    """Where an entry is."""
    return f"{LOG_FOLDER}/{number:0{NUMBER_DIGITS}d}.json"


def read_log(store: Store) -> list[LogEntry]:
    """Every entry, from the first. Raises ``ConflictError`` where the chain is broken."""
    try:
        keys = sorted(item.key for item in store.list(f"{LOG_FOLDER}/"))
    except MissingObjectError:
        return []
    entries: list[LogEntry] = []
    for number, (key, data) in enumerate(zip(keys, read_each(store.read, keys), strict=True), 1):
        if key != entry_key(number):
            raise _broken(store, entry_key(number), "is missing")
        if isinstance(data, StorageError):
            raise data
        try:
            document = decode_json(data)
            previous = document["previous"]
        except (ValueError, KeyError, TypeError):
            raise _broken(store, key, "is not an entry of the log") from None
        if previous != (entries[-1].digest if entries else None):
            raise _broken(store, key, "does not follow the entry before it")
        entries.append(LogEntry(number, sha256(data), document))
    return entries


def logged_runs(store: Store, entries: Sequence[LogEntry]) -> list[LoggedRun]:
    """The runs of the log, oldest first; only the last one can be open.

    Raises ``ConflictError`` for an entry that no driver writes there: each run is opened, then
    committed, then followed by the next.
    """
    runs: list[LoggedRun] = []
    for entry in entries:
        is_open = bool(runs) and runs[-1].commit is None
        match entry.document:
            case {
                "kind": "open",
                "run": str(run),
                "plan": str(plan),
                "config": dict(config),
            } if not is_open:
                runs.append(LoggedRun(run, plan, config))
            case {
                "kind": "commit",
                "run": run,
                "manifest": str(manifest),
                "rows": int(rows),
                "errors": int(errors),
                "sealed": int(sealed),
            } if is_open and run == runs[-1].id:
                runs[-1] = replace(runs[-1], commit=Commit(manifest, rows, errors, sealed))
            case _:
                raise _broken(store, entry_key(entry.number), "says what cannot be said there")
    return runs


def append_entry(store: Store, entries: Sequence[LogEntry], document: Mapping[str, Any]) -> bool:
    """Write the entry after the last of ``entries``; False when another driver was first."""
    previous = entries[-1].digest if entries else None
    try:
        store.create(entry_key(len(entries) + 1), encode_json({"previous": previous, **document}))
    except AlreadyExistsError:
        return False
    return True


def _broken(store: Store, key: str, what: str) -> ConflictError:
    return ConflictError(
        f"{store.uri}/{key} {what}: the log of this table was changed",
        hint="restore the object from a version of the bucket, or label into a new --output",
    )
