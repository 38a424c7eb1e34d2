"""Proves a table of labels from its files alone.

The log's chain, the plans and manifests that it names by digest, every part's bytes and rows, and
that the ids which were planned are the ids that are there, each once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnnray.errors import CnnrayError, MissingObjectError
from cnnray.labeling.commit import Run, read_manifest
from cnnray.labeling.fingerprints import Fingerprints, id_fingerprints, is_repeat, join
from cnnray.labeling.log import read_log
from cnnray.labeling.parts import read_footer
from cnnray.labeling.plan import DATA_FOLDER
from cnnray.labeling.runs import read_runs
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

    Raises ``ConflictError`` when the log itself is broken: then nothing can be proven.
    """
    proof = Proof()
    runs = read_runs(store, read_log(store))
    proof.runs = len(runs)
    ids: list[Fingerprints] = []
    known: set[str] = set()
    for run in runs:
        try:
            for rows in _verified_parts(run, proof, known):
                ids.append(id_fingerprints(rows))
                proof.rows += rows.num_rows
                proof.errors += pc.sum(pc.equal(rows["status"], "error")).as_py() or 0
        except CnnrayError as error:  # a plan or manifest that is not what the log names
            proof.problems.append(str(error).splitlines()[0])
    repeated = int(is_repeat(join(ids)).sum())
    if repeated:
        proof.problems.append(f"{repeated} rows have the key and etag of another row")
    proof.problems += _strangers(store, known)
    del proof.problems[MAX_PROBLEMS:]
    return proof


def _verified_parts(run: Run, proof: Proof, known: set[str]) -> Iterator[pa.Table]:
    """The rows of the parts of a run that are as planned; problems of the others are noted."""
    manifest = None
    if run.manifest is None:
        proof.open_run = run.id
    else:
        manifest = read_manifest(run)
        if manifest["part"].to_pylist() != list(range(run.plan.num_parts)):
            proof.problems.append(f"the manifest of run {run.id} has not the parts of its plan")
            return
    digests = manifest["sha256"].to_pylist() if manifest is not None else []
    for part, planned in run.plan.read_parts(range(run.plan.num_parts)):
        key = run.part_key(part)
        known.add(key)
        try:
            data = run.store.read(key)
        except MissingObjectError:
            if manifest is not None:
                proof.problems.append(f"{key} is missing")
            continue
        proof.parts += 1
        problem, rows = _check_part(run, part, data, planned=planned, digests=digests)
        if problem:
            proof.problems.append(f"{key} {problem}")
        elif rows.num_rows:
            yield rows
        else:
            proof.sealed += 1


def _check_part(
    run: Run, part: int, data: bytes, *, planned: pa.Table, digests: Sequence[str]
) -> tuple[str, pa.Table]:
    """What is wrong with a part (nothing: empty), and its rows."""
    nothing = pa.table({})
    if digests and sha256(data) != digests[part]:
        return "was changed: its SHA-256 is not the one of the manifest", nothing
    try:
        footer = read_footer(data)
        rows = pq.ParquetFile(io.BytesIO(data)).read(columns=["key", "etag", "status"])
    except (ValueError, pa.ArrowException, OSError):
        return "is damaged", nothing
    if (footer.run, footer.part) != (run.id, part):
        return f"is part {footer.part} of run {footer.run}", nothing
    if rows.num_rows and not rows.select(["key", "etag"]).equals(planned.select(["key", "etag"])):
        return "does not hold the images that were planned", nothing
    return "", rows


def _strangers(store: Store, known: set[str]) -> Iterator[str]:
    try:
        for item in store.list(f"{DATA_FOLDER}/"):
            if item.key not in known:
                yield f"{item.key} belongs to no run: readers of data/ see its rows"
    except MissingObjectError:
        return
