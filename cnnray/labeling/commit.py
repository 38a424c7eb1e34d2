"""From published parts to a committed run: its manifest, its log entry, its end by sealing."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnnray.errors import AlreadyExistsError, ConflictError, IncompleteError, MissingObjectError
from cnnray.labeling.crash_points import crash_point
from cnnray.labeling.log import MAX_RACES, Commit, append_entry, logged_runs, read_log
from cnnray.labeling.parts import PartFooter, PublishedPart, decode_part, write_part
from cnnray.labeling.plan import DATA_FOLDER, LabelPlan
from cnnray.schema import PARTS_SCHEMA
from cnnray.storage import Store, StoredObject, encode_parquet, sha256

MANIFEST_FOLDER = "_cnnray/manifests"

CHECK_THREADS = 4
"""Parts of other drivers that are read at a time before a commit: each is in memory whole."""


@dataclass(frozen=True)
class Run:
    """A run of the log: what it has to do, for which settings, and its end unless it is open."""

    store: Store
    id: str
    plan: LabelPlan
    config: Mapping[str, Any]
    commit: Commit | None

    def part_key(self, part: int) -> str:
        """Where a part is, below the table."""
        return f"{run_folder(self.id)}/{self.plan.part_name(part)}"

    @property
    def manifest_key(self) -> str:
        """Where the manifest is, below the table."""
        return f"{MANIFEST_FOLDER}/run={self.id}.parquet"


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What a committed run holds. Rows of sealed parts are planned, but not there."""

    rows: int
    ok: int
    errors: int
    parts: int
    sealed: int


def run_folder(run: str) -> str:
    """Where the parts of a run are, below the table."""
    return f"{DATA_FOLDER}/run={run}"


def labelled_inputs(run: Run) -> Iterator[pa.Table]:
    """The inputs of a committed run (``PLAN_SCHEMA``), part by part, without the sealed parts."""
    manifest = read_manifest(run)
    parts = manifest.filter(pc.greater(manifest["rows"], 0))["part"].to_pylist()
    yield from (table for _, table in run.plan.read_parts(parts))


def published_parts(run: Run) -> dict[int, StoredObject]:
    """The parts that are there. Raises ``ConflictError`` for a file that is none of the run's."""
    numbers = {run.part_key(part): part for part in range(run.plan.num_parts)}
    found = {}
    try:
        for item in run.store.list(f"{run_folder(run.id)}/"):
            if item.key not in numbers:
                raise ConflictError(f"{run.store.uri}/{item.key} is not a part of run {run.id}")
            found[numbers[item.key]] = item
    except MissingObjectError:  # a local folder that nobody has made yet
        pass
    return found


def missing_parts(run: Run) -> list[int]:
    """The parts that are not there yet, in order. Raises what ``published_parts`` does."""
    there = published_parts(run)
    return [part for part in range(run.plan.num_parts) if part not in there]


def publish_part(run: Run, part: int, rows: pa.Table) -> PublishedPart | None:
    """Write a part of a run, with a row for each of its inputs in order, or without rows.

    None when it was there already; raises what ``write_part`` does.
    """
    assert rows.num_rows in (0, run.plan.rows_of(part))
    return write_part(run.store, run.part_key(part), rows, run=run.id, part=part)


def check_part(
    run: Run, part: int, data: bytes, *, planned: pa.Table
) -> tuple[PartFooter, pa.Table]:
    """A part that holds the planned inputs in their order, or is sealed; as ``decode_part``."""
    footer, rows = decode_part(data, run=run.id, part=part)
    ids = ["key", "etag"]
    if rows.num_rows and not rows.select(ids).equals(planned.select(ids)):
        raise ValueError("does not hold the images that were planned")
    return footer, rows


def finish_run(run: Run, published: Mapping[int, PublishedPart]) -> RunTotals:
    """Commit a run whose parts are all there; ``published`` are those that this driver wrote.

    Parts of other drivers are read and checked first. Committing twice, or by two drivers, is the
    same as committing once. Raises ``IncompleteError`` when a part is missing, ``ConflictError``
    when a part is not what was planned, or the manifest not what the parts are.
    """
    found = published_parts(run)
    missing = run.plan.num_parts - len(found)
    if missing:
        raise IncompleteError(
            f"{missing} of {run.plan.num_parts} parts are missing",
            hint="submit the same command again: it labels what is left",
        )
    others = _check_parts(run, [part for part in sorted(found) if part not in published])
    manifest = _make_manifest(run, found, {**published, **others})
    commit = _commit_of(manifest, digest=_write_manifest(run, manifest))
    document = {"kind": "commit", "run": run.id, **asdict(commit)}
    for _ in range(MAX_RACES):
        entries = read_log(run.store)
        logged = logged_runs(run.store, entries)
        if any(other.commit is not None for other in logged if other.id == run.id):
            return read_totals(manifest)
        append_entry(run.store, entries, document)
        crash_point("log.after_commit")
    raise IncompleteError(f"other drivers were {MAX_RACES} times faster at {run.store.uri}")


def seal_run(run: Run, nothing: pa.Table) -> RunTotals:
    """End an open run: its missing parts become ``nothing``, a table without rows, then commit.

    A driver that wakes up later finds every name taken. The images of the sealed parts are planned
    again by the next run.
    """
    for part in missing_parts(run):
        publish_part(run, part, nothing)
    return finish_run(run, {})


def read_manifest(run: Run) -> pa.Table:
    """The parts of a committed run (``PARTS_SCHEMA``).

    Raises ``ConflictError`` when the log says otherwise.
    """
    assert run.commit is not None
    data = run.store.read(run.manifest_key)
    if sha256(data) != run.commit.manifest:
        raise ConflictError(f"{run.store.uri}/{run.manifest_key} was changed since the commit")
    manifest = _decode_manifest(run, data)
    if _commit_of(manifest, digest=run.commit.manifest) != run.commit:
        raise ConflictError(
            f"{run.store.uri}/{run.manifest_key} has other sums than the log says of run {run.id}"
        )
    return manifest


def read_totals(manifest: pa.Table) -> RunTotals:
    """Sums over the parts of a manifest."""
    return RunTotals(
        rows=pc.sum(manifest["rows"]).as_py(),
        ok=pc.sum(manifest["ok"]).as_py(),
        errors=pc.sum(manifest["errors"]).as_py(),
        parts=manifest.num_rows,
        sealed=pc.sum(pc.equal(manifest["rows"], 0)).as_py(),
    )


def _commit_of(manifest: pa.Table, *, digest: str) -> Commit:
    totals = read_totals(manifest)
    return Commit(digest, rows=totals.rows, errors=totals.errors, sealed=totals.sealed)


def _check_parts(run: Run, parts: Iterable[int]) -> dict[int, PublishedPart]:
    """Read parts of other drivers, a few at a time. Raises ``ConflictError`` for a wrong one."""

    def check(item: tuple[int, pa.Table]) -> PublishedPart:
        part, planned = item
        data = run.store.read(run.part_key(part))
        try:
            footer, _ = check_part(run, part, data, planned=planned)
        except ValueError as error:
            raise ConflictError(f"{run.store.uri}/{run.part_key(part)} {error}") from error
        return PublishedPart(footer, sha256(data))

    checked: dict[int, PublishedPart] = {}
    to_check = run.plan.read_parts(parts)
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        # Not all to the pool at once: it would take the whole plan into memory.
        while batch := list(itertools.islice(to_check, CHECK_THREADS)):
            checked |= {known.footer.part: known for known in pool.map(check, batch)}
    return checked


def _make_manifest(
    run: Run, found: Mapping[int, StoredObject], parts: Mapping[int, PublishedPart]
) -> pa.Table:
    """What is known of every part, in their order (``PARTS_SCHEMA``)."""
    records = [
        {
            "path": f"{run.store.uri}/{run.part_key(part)}",
            "part": part,
            "rows": known.footer.rows,
            "ok": known.footer.ok,
            "errors": known.footer.rows - known.footer.ok,
            "bytes": found[part].size,
            "etag": found[part].etag,
            "sha256": known.digest,
        }
        for part, known in sorted(parts.items())
    ]
    return pa.Table.from_pylist(records, PARTS_SCHEMA)


def _write_manifest(run: Run, manifest: pa.Table) -> str:
    """Write the manifest, unless another driver has; the digest of what is there."""
    data = encode_parquet(manifest, compression="zstd")
    crash_point("run.before_manifest")
    try:
        run.store.create(run.manifest_key, data)
    except AlreadyExistsError:  # of the same parts, in other bytes: by another version of pyarrow
        data = run.store.read(run.manifest_key)
        if not _same_parts(_decode_manifest(run, data), manifest):
            raise ConflictError(
                f"{run.store.uri}/{run.manifest_key} is not of the parts that are there"
            ) from None
    crash_point("run.after_manifest")
    return sha256(data)


def _decode_manifest(run: Run, data: bytes) -> pa.Table:
    try:
        manifest = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError):
        manifest = pa.table({})
    parts = list(range(run.plan.num_parts))
    if not manifest.schema.equals(PARTS_SCHEMA) or manifest["part"].to_pylist() != parts:
        raise ConflictError(f"{run.store.uri}/{run.manifest_key} is not a manifest of run {run.id}")
    return manifest


def _same_parts(manifest: pa.Table, other: pa.Table) -> bool:
    """Whether they differ at most in how a store names its objects and their versions."""
    names = ["part", "rows", "ok", "errors", "bytes", "sha256"]
    return bool(manifest.select(names).equals(other.select(names)))
