"""The classify job: actors read, decode and label chunks; the driver alone writes the parts."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.cluster.actors import actor_device, map_tables
from cnnray.cluster.listing import list_entries
from cnnray.cluster.runtime import ray_cluster
from cnnray.config import ClassifySettings
from cnnray.console import ProgressLine
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import DataError, IncompleteError, TooManyBadImagesError, UsageError
from cnnray.images.decode import DecodeLimits
from cnnray.labeling.labeler import Labeler, Sample
from cnnray.labeling.parts import DATA_FOLDER, PartAssembler, labels_exist, publish_part
from cnnray.labeling.plan import LabelPlan, plan_labels
from cnnray.models.bundle import load_bundle
from cnnray.storage import Store, open_store

logger = logging.getLogger(__name__)


class LabelActor:
    """One worker: labels chunks with its own copy of the model."""

    def __init__(self, *, model: Store, source: Source, settings: ClassifySettings) -> None:
        self.source = source
        self.labeler = Labeler(
            load_bundle(model),
            top_k=settings.top_k,
            embeddings=settings.embeddings,
            batch_size=settings.batch_size,
            limits=DecodeLimits(**settings.limits.model_dump()),
            device=actor_device(use_gpu=settings.scaling.use_gpu),
        )

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Label rows of a chunk, with the place of the chunk in the plan."""
        samples = (
            Sample(key, etag, data)
            for key, etag, data in zip(
                chunk["key"].to_pylist(),
                chunk["etag"].to_pylist(),
                self.source.read(chunk),
                strict=True,
            )
        )
        rows = self.labeler.label(samples)
        return rows.append_column("part", chunk["part"]).append_column("chunk", chunk["chunk"])


def classify(settings: ClassifySettings) -> dict[str, Any]:
    """Label every image of the input once, and return the job's result.

    Raises ``UsageError`` when there are labels at the output, ``DataError`` when there is nothing
    to label, ``TooManyBadImagesError`` (all rows are there) beyond the budget.
    """
    started = time.perf_counter()
    output, model = open_store(settings.output), open_store(settings.model)
    bundle = load_bundle(model)  # a wrong bundle is found before anything is started
    if labels_exist(output):
        raise UsageError(f"{output.uri} holds labels already", hint="choose another --output")
    source = open_source(
        settings.input, format=settings.format, labelled=False, **settings.columns.options()
    )
    with ray_cluster(settings.cluster):
        entries = list_entries(source, stall_seconds=settings.cluster.stall_seconds)
        if entries.num_rows == 0:
            raise DataError(f"no images at all in {settings.input}", hint="check --input")
        plan = plan_labels(entries, part_rows=settings.part_rows, chunk_rows=settings.chunk_rows)
        run = _run_id(plan, bundle.digest)
        counts = _label(plan, run=run, source=source, model=model, output=output, settings=settings)
    return _result(
        plan,
        counts,
        run=run,
        output=output,
        settings=settings,
        seconds=time.perf_counter() - started,
    )


def _run_id(plan: LabelPlan, model_digest: str) -> str:
    """A name for people (the time) that also says what was done (plan and model)."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{now}-{plan.digest[:8]}-{model_digest[:8]}"


def _label(
    plan: LabelPlan,
    *,
    run: str,
    source: Source,
    model: Store,
    output: Store,
    settings: ClassifySettings,
) -> dict[str, int]:
    """Label every chunk and publish every part; counts of rows by status."""
    assembler = PartAssembler(plan)
    counts = {"ok": 0, "error": 0}
    with ProgressLine(
        total=plan.entries.num_rows,
        unit="images",
        label="classify",
        seconds=settings.cluster.progress_seconds,
    ) as progress:
        for rows in map_tables(
            _chunk_tables(plan),
            LabelActor,
            {"model": model, "source": source, "settings": settings},
            scaling=settings.scaling,
            stall_seconds=settings.cluster.stall_seconds,
        ):
            for part, chunk, labels in _by_chunk(rows):
                for item in pc.value_counts(labels["status"]).to_pylist():
                    counts[item["values"]] += item["counts"]
                whole = assembler.add(part, chunk, labels)
                if whole is not None:
                    name = f"{DATA_FOLDER}/run={run}/{plan.part_name(part)}"
                    publish_part(output, name, whole)
            done = counts["ok"] + counts["error"]
            parts = f"{len(assembler.finished)} / {plan.num_parts} parts"
            progress.update(done, f"{counts['error']:,} errors, {parts}")
    if assembler.num_missing:
        raise IncompleteError(f"{assembler.num_missing} of {plan.num_parts} parts are incomplete")
    return counts


def _chunk_tables(plan: LabelPlan) -> Iterator[pa.Table]:
    for chunk in plan.chunks():
        size = chunk.entries.num_rows
        yield chunk.entries.append_column(
            "part", pa.array([chunk.part] * size, pa.int32())
        ).append_column("chunk", pa.array([chunk.number] * size, pa.int32()))


def _by_chunk(rows: pa.Table) -> Iterator[tuple[int, int, pa.Table]]:
    """(part, chunk, label rows) of each chunk in a block: Ray Data may join or split tables."""
    places = rows.select(["part", "chunk"])
    labels = rows.drop_columns(["part", "chunk"])
    for place in places.group_by(["part", "chunk"]).aggregate([]).to_pylist():
        mask = pc.and_(
            pc.equal(places["part"], place["part"]), pc.equal(places["chunk"], place["chunk"])
        )
        yield place["part"], place["chunk"], labels.filter(mask)


def _result(
    plan: LabelPlan,
    counts: dict[str, int],
    *,
    run: str,
    output: Store,
    settings: ClassifySettings,
    seconds: float,
) -> dict[str, Any]:
    planned = plan.entries.num_rows
    assert counts["ok"] + counts["error"] == planned
    logger.info(
        "labelled %s + errors %s = %s images planned (%s duplicate keys left out)",
        f"{counts['ok']:,}",
        f"{counts['error']:,}",
        f"{planned:,}",
        f"{plan.duplicates:,}",
    )
    result = {
        "run": run,
        "planned": planned,
        "labeled": counts["ok"],
        "errors": counts["error"],
        "duplicates": plan.duplicates,
        "parts": plan.num_parts,
        "data": f"{output.uri}/{DATA_FOLDER}",
        "images_per_second": round(planned / seconds, 1),
        "seconds": round(seconds, 1),
    }
    if settings.budget.exceeded(bad=counts["error"], total=planned):
        raise TooManyBadImagesError(
            f"{counts['error']:,} of {planned:,} images could not be labelled:"
            f" see status and error_code in {result['data']}",
            hint="every image has its row; raise --budget.max_fraction to accept it",
            result=result,
        )
    return result
