"""From published parts to a committed run: its manifest, its log entry, its end by sealing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnnray.errors import AlreadyExistsError, ConflictError, IncompleteError, MissingObjectError
from cnnray.labeling.crash_points import crash_point
from cnnray.labeling.log import MAX_RACES, append_entry, read_log
from cnnray.labeling.parts import PublishedPart, publish_part, read_part
from cnnray.labeling.plan import DATA_FOLDER, LabelPlan
from cnnray.schema import PARTS_SCHEMA
from cnnray.storage import Store, StoredObject, encode_parquet, sha256

MANIFEST_FOLDER = "_cnnray/manifests"

CHECK_THREADS = 4
"""Parts of other drivers that are read at a time before a commit: each is in memory whole."""


@dataclass(frozen=True)
class Run:
    """A run of the log: what it has to do, for which settings, and its manifest once committed."""

    store: Store
    id: str
    plan: LabelPlan
    config: Mapping[str, Any]
    manifest: str | None  # digest

    def part_key(self, part: int) -> str:
        """Where a part is, below the table."""
        return f"{DATA_FOLDER}/run={self.id}/{self.plan.part_name(part)}"

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
        for item in run.store.list(f"{DATA_FOLDER}/run={run.id}/"):
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


def finish_run(run: Run, published: Mapping[int, PublishedPart]) -> RunTotals:
    """Commit a run whose parts are all there; ``published`` are those that this driver wrote.

    Parts of other drivers are read and checked first. Committing twice, or by two drivers, is the
    same as committing once. Raises ``IncompleteError`` when a part is missing.
    """
    found = published_parts(run)
    missing = run.plan.num_parts - len(found)
    if missing:
        raise IncompleteError(
            f"{missing} of {run.plan.num_parts} parts are missing",
            hint="submit the same command again: it labels what is left",
        )
    manifest = _write_manifest(run, _part_records(run, found, published))
    totals = read_totals(pq.ParquetFile(io.BytesIO(manifest)).read())
    document = {
        "kind": "commit",
        "run": run.id,
        "manifest": sha256(manifest),
        "rows": totals.rows,
        "errors": totals.errors,
        "sealed": totals.sealed,
    }
    for _ in range(MAX_RACES):
        entries = read_log(run.store)
        documents = [entry.document for entry in entries]
        if any(said["kind"] == "commit" and said["run"] == run.id for said in documents):
            return totals
        append_entry(run.store, entries, document)
        crash_point("log.after_commit")
    raise IncompleteError(f"other drivers were {MAX_RACES} times faster at {run.store.uri}")


def seal_run(run: Run, nothing: pa.Table) -> RunTotals:
    """End an open run: its missing parts become ``nothing``, a table without rows, then commit.

    A driver that wakes up later finds every name taken. The images of the sealed parts are planned
    again by the next run.
    """
    for part in missing_parts(run):
        publish_part(run.store, run.part_key(part), nothing, run=run.id, part=part)
    return finish_run(run, {})


def read_manifest(run: Run) -> pa.Table:
    """The parts of a committed run (``PARTS_SCHEMA``). Raises ``ConflictError`` if changed."""
    data = run.store.read(run.manifest_key)
    if sha256(data) != run.manifest:
        raise ConflictError(f"{run.store.uri}/{run.manifest_key} was changed since the commit")
    return pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)


def read_totals(manifest: pa.Table) -> RunTotals:
    """Sums over the parts of a manifest."""
    return RunTotals(
        rows=pc.sum(manifest["rows"]).as_py(),
        ok=pc.sum(manifest["ok"]).as_py(),
        errors=pc.sum(manifest["errors"]).as_py(),
        parts=manifest.num_rows,
        sealed=pc.sum(pc.equal(manifest["rows"], 0)).as_py(),
    )


def _write_manifest(run: Run, records: Iterable[dict[str, Any]]) -> bytes:
    """Write the manifest, unless another driver has; the bytes that are there."""
    manifest = encode_parquet(pa.Table.from_pylist(list(records), PARTS_SCHEMA), compression="zstd")
    crash_point("run.before_manifest")
    try:
        run.store.create(run.manifest_key, manifest)
    except AlreadyExistsError:  # of the same parts, in other bytes: by another version of pyarrow
        return run.store.read(run.manifest_key)
    crash_point("run.after_manifest")
    return manifest


def _part_records(
    run: Run, found: Mapping[int, StoredObject], published: Mapping[int, PublishedPart]
) -> Iterator[dict[str, Any]]:
    """The manifest's rows, in the order of the parts."""

    def look(part: int) -> PublishedPart:
        return published.get(part) or read_part(run.store, run.part_key(part))

    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for part, known in enumerate(pool.map(look, sorted(found))):
            planned = run.plan.rows_of(part)
            footer = known.footer
            if (footer.run, footer.part) != (run.id, part) or footer.rows not in (0, planned):
                raise ConflictError(f"{run.store.uri}/{run.part_key(part)} is not what was planned")
            yield {
                "path": f"{run.store.uri}/{run.part_key(part)}",
                "part": part,
                "rows": footer.rows,
                "ok": footer.ok,
                "errors": footer.rows - footer.ok,
                "bytes": found[part].size,
                "etag": found[part].etag,
                "sha256": known.digest,
            }
