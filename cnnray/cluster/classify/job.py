"""The classify job: workers read, decode and label chunks; the driver alone writes.

Plan, publish and commit are ``cnnray.labeling``'s: a driver may be killed anywhere, and run twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.cluster.classify.actors import LabelJob
from cnnray.cluster.classify.dry_run import dry_run
from cnnray.cluster.classify.forecast import measure_run, predict_run
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import MAX_UNITS, Stage, map_units
from cnnray.cluster.inference.choices import decoded_block_bytes, engine_choice
from cnnray.cluster.inference.engine_check import CheckedEngine, check_engine
from cnnray.cluster.inference.stages import plan_stages
from cnnray.config import ClassifySettings
from cnnray.console import ProgressLine, format_seconds
from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import DataError, IncompleteError, TooManyBadImagesError
from cnnray.labeling.assembler import PartAssembler
from cnnray.labeling.commit import Run, RunTotals, finish_run, missing_parts, publish_part
from cnnray.labeling.delta import check_delta, export_runs
from cnnray.labeling.parts import PublishedPart
from cnnray.labeling.plan import DATA_FOLDER, PlanReader
from cnnray.labeling.runs import begin_run, claim_table
from cnnray.labeling.units import plan_units
from cnnray.models.bundle import Bundle, load_bundle, read_bundle_spec
from cnnray.process import stop_on_sigterm
from cnnray.storage import Store, open_store

logger = logging.getLogger(__name__)

MAX_PASSES = 3
"""Times that a run's missing parts are gone through: another driver may die with some of them."""


def classify(settings: ClassifySettings, bundle: Bundle | None = None) -> dict[str, Any]:
    """Label what is new in the input, each image once, and return the job's result.

    ``bundle`` is the model's, where it has been loaded already.

    Raises ``ConflictError`` when the output is of another model or an open run has other settings,
    ``DataError`` when there are no images, ``SettingsError`` when the engine's labels are not those
    of eager, ``IncompleteError`` when work is left (on SIGTERM, too), ``TooManyBadImagesError``
    (all rows are there) beyond the budget.
    """
    started = time.perf_counter()
    engine = CheckedEngine(engine_choice(settings))  # unknown until it is compared
    with stop_on_sigterm(), contextlib.ExitStack() as resources:
        output = open_store(settings.output, single_writer=settings.single_writer)
        model = open_store(settings.model)
        if settings.delta:
            check_delta(output)
        bundle = bundle or load_bundle(model)  # a wrong bundle is found before anything is started
        source = open_source(
            settings.input, format=settings.format, labelled=False, **settings.columns.options()
        )
        identity, config = _identity(settings, bundle), _config(settings)
        if settings.dry_run:
            return dry_run(
                settings,
                bundle,
                source,
                output,
                identity=identity,
                config=config,
                list_inputs=lambda: _list_inputs(source, settings),
            )
        claim_table(output, identity)
        predicted: float | None = None
        finished: list[tuple[Run, RunTotals]] = []
        is_mine = False
        while not is_mine:  # a run that was open is finished first, then what is new since
            begun = begin_run(
                output,
                config=config,
                list_inputs=lambda: _list_inputs(source, settings),
                part_rows=settings.part_rows,
                on_changed=settings.on_changed,
            )
            if begun is None:
                break
            run, is_mine = begun
            job = LabelJob(model, source, run, settings)
            before = time.perf_counter() - started
            totals, seconds, engine = _work_on(job, bundle, is_mine=is_mine, resources=resources)
            finished.append((run, totals))
            predicted = predicted if seconds is None else before + seconds
        if settings.delta:  # with what drivers that died had committed, and when nothing is new
            logger.info("%d runs added to the Delta table", export_runs(output))
    seconds = time.perf_counter() - started
    if predicted is not None:
        logger.info("predicted %s, took %s", *map(format_seconds, (predicted, seconds)))
    return _result(finished, output, settings, engine, seconds=seconds, predicted_seconds=predicted)


def _identity(settings: ClassifySettings, bundle: Bundle) -> dict[str, Any]:
    """What all rows of a table have in common. (int8 is another model; the rest agrees.)"""
    is_int8 = settings.engine.precision == "int8"
    return {
        "model": bundle.digest,
        "top_k": min(settings.top_k, len(bundle.spec.classes)),
        "embeddings": settings.embeddings,
        **({"precision": "int8"} if is_int8 else {}),
    }


def _config(settings: ClassifySettings) -> dict[str, Any]:
    """The settings that decide what a run labels: another driver with the same may join it."""
    config: dict[str, Any] = {"input": open_store(settings.input).uri}
    for name in ("format", "part_rows", "on_changed"):
        config[name] = getattr(settings, name)
    for name in ("columns", "limits"):
        section = getattr(settings, name).model_dump()
        config |= {f"{name}.{setting}": value for setting, value in section.items()}
    return config


def _list_inputs(source: Source, settings: ClassifySettings) -> Iterator[pa.Table]:
    count = 0
    for table in list_in_order(source):
        count += table.num_rows
        yield table
    logger.info("%s images in %s", f"{count:,}", settings.input)
    if count == 0:
        raise DataError(f"no images at all in {settings.input}", hint="check --input")


def _work_on(
    job: LabelJob, bundle: Bundle, *, is_mine: bool, resources: contextlib.ExitStack
) -> tuple[RunTotals, float | None, CheckedEngine]:
    """Label and publish every missing part of a run, and commit it.

    Ray is started when there is something to label, and lives as long as ``resources``. Returned
    are also the prediction of how many seconds this takes, for a large run, and the engine.
    """
    started, predicted = time.perf_counter(), None
    engine: CheckedEngine | None = None
    run = job.run
    published: dict[int, PublishedPart] = {}
    for _ in range(MAX_PASSES):
        missing = missing_parts(run)
        if not missing:
            break
        images = sum(map(run.plan.rows_of, missing))
        logger.info(
            "run %s: %s of %s images in %d of %d parts to label",
            run.id,
            f"{images:,}",
            f"{run.plan.rows:,}",
            len(missing),
            run.plan.num_parts,
        )
        if not is_mine:  # from the other end: the driver that opened the run may be alive
            missing.reverse()
        measured = measure_run(bundle, job.source, run, missing, job.settings)
        resources.enter_context(ray_cluster(job.settings.cluster))  # the second time it is there
        if engine is None:
            engine = check_engine(job, engine_choice(job.settings))
            job = dataclasses.replace(job, engine=engine.prepared)
        stages = plan_stages(job, job.settings)
        if measured is not None and predicted is None:
            predicted = time.perf_counter() - started
            predicted += predict_run(measured, stages, job.settings, images=images)
        published |= _label(job, stages, missing)
    return (
        finish_run(run, published),
        predicted,
        engine or CheckedEngine(engine_choice(job.settings)),
    )


def _label(
    job: LabelJob, stages: Sequence[Stage], missing: Sequence[int]
) -> dict[int, PublishedPart]:
    """Label the missing parts and publish each one; those that this driver has written."""
    run, settings = job.run, job.settings
    published: dict[int, PublishedPart] = {}
    done = run.plan.rows - sum(map(run.plan.rows_of, missing))
    errors, parts = 0, run.plan.num_parts - len(missing)
    with (
        contextlib.closing(PartAssembler()) as assembler,
        ProgressLine(
            total=run.plan.rows,
            initial=done,
            unit="images",
            label="classify",
            seconds=settings.cluster.progress_seconds,
        ) as progress,
    ):
        for rows in _label_rows(job, stages, missing, assembler):
            errors += pc.sum(pc.equal(rows["status"], "error")).as_py() or 0
            for part, whole in assembler.add(rows):
                result = publish_part(run, part, whole)
                published |= {part: result} if result else {}
                parts += 1
            note = f"{errors:,} errors, {parts} / {run.plan.num_parts} parts"
            progress.update(done + assembler.taken, note)
    return published


def _label_rows(
    job: LabelJob, stages: Sequence[Stage], parts: Sequence[int], assembler: PartAssembler
) -> Iterator[pa.Table]:
    """Label rows of some parts as workers finish them; the assembler knows what to expect."""
    run, settings = job.run, job.settings
    units = plan_units(
        run.plan,
        parts,
        chunk_rows=settings.chunk_rows,
        workers=stages[0].max_workers,
        max_units=MAX_UNITS,
    )
    preprocessing = read_bundle_spec(job.model).preprocessing
    reader, expected = PlanReader(run.plan), set[int]()
    for rows in map_units(
        [unit.to_table() for unit in units],
        stages,
        stall_seconds=settings.cluster.stall_seconds,
        block_bytes=decoded_block_bytes(preprocessing, settings),
    ):
        for part in sorted(set(pc.unique(rows["part"]).to_pylist()) - expected):
            assembler.expect(part, reader.read(part))
            expected.add(part)
        yield rows


def _result(
    finished: Sequence[tuple[Run, RunTotals]],
    output: Store,
    settings: ClassifySettings,
    engine: CheckedEngine,
    *,
    seconds: float,
    predicted_seconds: float | None,
) -> dict[str, Any]:
    planned = sum(run.plan.rows for run, _ in finished)
    rows, ok, errors = (
        sum(getattr(totals, name) for _, totals in finished) for name in ("rows", "ok", "errors")
    )
    duplicates = sum(run.plan.duplicates for run, _ in finished)
    result = {
        "run": finished[-1][0].id if finished else None,
        "runs": len(finished),
        "planned": planned,
        "labeled": ok,
        "errors": errors,
        "duplicates": duplicates,
        "parts": sum(totals.parts for _, totals in finished),
        "engine": str(engine.choice),
        "agreement": engine.agreement and engine.agreement.fraction,
        "data": f"{output.uri}/{DATA_FOLDER}",
        "images_per_second": round(rows / seconds, 1),
        "seconds": round(seconds, 1),
        "predicted_seconds": None if predicted_seconds is None else round(predicted_seconds, 1),
    }
    if not finished:
        logger.info("nothing new: every image is labelled already")
        return result
    logger.info(
        "labelled %s + errors %s = %s images planned (%s duplicate keys left out)",
        *(f"{number:,}" for number in (ok, errors, planned, duplicates)),
    )
    if rows != planned:
        raise IncompleteError(
            f"{planned - rows:,} images are in parts that were sealed by an abort",
            hint="submit the same command again: it labels them",
            result=result,
        )
    if settings.budget.exceeded(bad=errors, total=planned):
        raise TooManyBadImagesError(
            f"{errors:,} of {planned:,} images could not be labelled:"
            f" see status and error_code in {result['data']}",
            hint="every image has its row; raise --budget.max_fraction to accept it",
            result=result,
        )
    return result
