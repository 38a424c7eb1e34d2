"""Proves a table of labels from its files alone.

The log's chain, the plans and manifests that it names by digest, every part's bytes and rows, and
that the ids which were planned are the ids that are there, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import ConflictError, MissingObjectError
from cnnray.labeling.commit import Run, check_part, read_manifest, run_folder
from cnnray.labeling.fingerprints import Fingerprints, id_fingerprints, is_repeat, join
from cnnray.labeling.log import logged_runs, read_log
from cnnray.labeling.plan import DATA_FOLDER
from cnnray.labeling.runs import read_run
from cnnray.storage import Store, sha256

MAX_PROBLEMS = 100
"""Problems that are listed; more of them say nothing more."""


@dataclass
class Proof:
    """What was found in a table."""

    runs: int = 0
    open_run: str | None = None
    rows: int = 0
    errors: int = 0
    parts: int = 0
    sealed: int = 0
    problems: list[str] = field(default_factory=list)


def verify_table(store: Store) -> Proof:
    """Read a whole table, a part at a time, and say what is wrong with it.

    Raises ``ConflictError`` when the log itself is broken: then nothing can be proven. Raises
    ``StorageError`` when the store fails, which proves nothing either.
    """
    proof = Proof()
    files = _list_data(store)  # before the log, which then knows the runs of all of them
    known: set[str] = set()
    unproven: set[str] = set()  # folders of runs that cannot be proven: one problem is enough
    ids: list[Fingerprints] = []
    for logged in logged_runs(store, read_log(store)):
        proof.runs += 1
        if logged.commit is None:
            proof.open_run = logged.id
        try:
            run = read_run(store, logged)
            known.update(map(run.part_key, range(run.plan.num_parts)))
            for rows in _verified_parts(run, proof):
                ids.append(id_fingerprints(rows))
                proof.rows += rows.num_rows
                proof.errors += pc.sum(pc.equal(rows["status"], "error")).as_py() or 0
        except (ConflictError, MissingObjectError) as error:  # a plan or manifest is not as logged
            proof.problems.append(str(error).splitlines()[0])
            unproven.add(run_folder(logged.id))
    repeated = int(is_repeat(join(ids)).sum())
    if repeated:
        proof.problems.append(f"{repeated} rows have the key and etag of another row")
    proof.problems += [
        f"{key} belongs to no run: readers of data/ see its rows"
        for key in files
        if key not in known and key.rpartition("/")[0] not in unproven
    ]
    del proof.problems[MAX_PROBLEMS:]
    return proof


def _list_data(store: Store) -> list[str]:
    try:
        return [item.key for item in store.list(f"{DATA_FOLDER}/")]
    except MissingObjectError:
        return []


def _verified_parts(run: Run, proof: Proof) -> Iterator[pa.Table]:
    """The rows of the parts of a run that are as planned; problems of the others are noted."""
    digests = None if run.commit is None else read_manifest(run)["sha256"].to_pylist()
    for part, planned in run.plan.read_parts(range(run.plan.num_parts)):
        key = run.part_key(part)
        try:
            data = run.store.read(key)
        except MissingObjectError:
            if digests is not None:
                proof.problems.append(f"{key} is missing")
            continue
        proof.parts += 1
        try:
            rows = _check_rows(run, part, data, planned=planned, digests=digests)
        except ValueError as error:
            proof.problems.append(f"{key} {error}")
            continue
        if rows.num_rows:
            yield rows
        else:
            proof.sealed += 1


def _check_rows(
    run: Run, part: int, data: bytes, *, planned: pa.Table, digests: Sequence[str] | None
) -> pa.Table:
    """The rows of a part that is as its manifest and plan say. Raises what ``check_part`` does."""
    if digests is not None and sha256(data) != digests[part]:
        raise ValueError("was changed: its SHA-256 is not the one of the manifest")
    _, rows = check_part(run, part, data, planned=planned)
    return rows
