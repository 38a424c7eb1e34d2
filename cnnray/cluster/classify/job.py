"""The classify job: workers read, decode and label; the driver alone writes.

Plan, publish and commit are ``cnnray.labeling``'s: a driver may be killed anywhere, and run twice.
Torch and Ray take seconds to import and to start. So nothing here imports them, and for a run that
is sure to be large a thread opens the model while this one starts Ray. (Not the other way round:
Ray's core keeps a SIGTERM handler of its own unless it starts in the main thread.)
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

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
from cnnray.labeling.runs import TABLE_KEY, begin_run, claim_table
from cnnray.process import stop_on_sigterm
from cnnray.schema import BUNDLE_KEY
from cnnray.storage import Store, open_store

if TYPE_CHECKING:
    from cnnray.cluster.classify.on_cluster import ClusterLabeler
    from cnnray.models.bundle import StoredBundle

logger = logging.getLogger(__name__)

MAX_PASSES = 3
"""Times that a run's missing parts are gone through: another driver may die with some of them."""
MAX_SMALL_RUN = 2_000
"""Images of a run that may be over before a cluster has started; more always go to one."""


def classify(settings: ClassifySettings) -> dict[str, Any]:
    """Label what is new in the input, each image once, and return the job's result.

    Raises ``ConflictError`` when the output is of another model or an open run has other settings,
    ``DataError`` when there are no images, ``SettingsError`` when the engine's labels are not those
    of eager, ``IncompleteError`` when work is left (on SIGTERM, too), ``TooManyBadImagesError``
    (all rows are there) beyond the budget.
    """
    started = time.perf_counter()
    with stop_on_sigterm(), contextlib.ExitStack() as resources:
        output = open_store(settings.output, single_writer=settings.single_writer)
        if settings.delta:
            check_delta(output)
        if open_store(settings.model).head(BUNDLE_KEY) is None:
            _import_and_open(settings.model)  # raises what there is to say, before anything starts
        source = open_source(
            settings.input, format=settings.format, labelled=False, **settings.columns.options()
        )
        bundle = _open_bundle(settings, source, output, resources)
        _require_engine(settings)
        identity, config = _identity(settings, bundle), _config(settings)
        if settings.dry_run:
            from cnnray.cluster.classify.dry_run import dry_run

            return dry_run(
                settings,
                bundle.load(),
                source,
                output,
                identity=identity,
                config=config,
                list_inputs=lambda: _list_inputs(source, settings),
            )
        claim_table(output, identity)
        labeler = _Labeler(settings, bundle, source, resources, started=started)
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
            finished.append((run, _work_on(run, labeler, is_mine=is_mine)))
        if settings.delta:  # with what drivers that died had committed, and when nothing is new
            logger.info("%d runs added to the Delta table", export_runs(output))
    seconds, facts = time.perf_counter() - started, labeler.facts
    if (predicted := facts["predicted_seconds"]) is not None:
        logger.info("predicted %s, took %s", *map(format_seconds, (predicted, seconds)))
    return _result(finished, output, settings, facts, seconds=seconds)


def _open_bundle(
    settings: ClassifySettings, source: Source, output: Store, resources: contextlib.ExitStack
) -> StoredBundle:
    """The model; Ray starts beside it where it is sure to be needed.

    Its network, which takes seconds more to import, is then the workers' alone. The thread begins
    when Ray is imported: the two would only take turns. Ray's start is waiting.
    """
    if not _is_large_first_run(settings, source, output):
        bundle = _import_and_open(settings.model)
        bundle.load()
        return bundle

    from cnnray.cluster.core.session import ray_cluster

    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(_import_and_open, settings.model)
        thread.submit(importlib.import_module, "cnnray.cluster.classify.on_cluster")
        resources.enter_context(ray_cluster(settings.cluster))
        return opening.result()


def _import_and_open(uri: str) -> StoredBundle:
    from cnnray.models.bundle import open_bundle  # torch

    return open_bundle(open_store(uri))


def _require_engine(settings: ClassifySettings) -> None:
    """Raise ``SettingsError`` for an engine that there is not, before anything is written."""
    from cnnray.cluster.inference.choices import engine_choice  # torch

    engine_choice(settings)


def _is_large_first_run(settings: ClassifySettings, source: Source, output: Store) -> bool:
    """Whether there is no table yet, and more images for it than a small run has."""
    if settings.dry_run or output.head(TABLE_KEY) is not None:
        return False
    listed = 0
    for table in list_in_order(source):
        listed += table.num_rows
        if listed > MAX_SMALL_RUN:
            return True
    return False


def _identity(settings: ClassifySettings, bundle: StoredBundle) -> dict[str, Any]:
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


def _work_on(run: Run, labeler: _Labeler, *, is_mine: bool) -> RunTotals:
    """Label and publish every missing part of a run, and commit it."""
    published: dict[int, PublishedPart] = {}
    for _ in range(MAX_PASSES):
        missing = missing_parts(run)
        if not missing:
            break
        logger.info(
            "run %s: %s of %s images in %d of %d parts to label",
            run.id,
            f"{sum(map(run.plan.rows_of, missing)):,}",
            f"{run.plan.rows:,}",
            len(missing),
            run.plan.num_parts,
        )
        if not is_mine:  # from the other end: the driver that opened the run may be alive
            missing.reverse()
        published |= publish_parts(run, missing, labeler)
    return finish_run(run, published)


def publish_parts(run: Run, missing: Sequence[int], labeler: _Labeler) -> dict[int, PublishedPart]:
    """Label the missing parts and publish each one; those that this driver has written."""
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
            seconds=labeler.settings.cluster.progress_seconds,
        ) as progress,
        contextlib.closing(labeler.label(run, missing)) as labeled,
    ):
        for rows in _expected(labeled, run, assembler):
            errors += pc.sum(pc.equal(rows["status"], "error")).as_py() or 0
            for part, whole in assembler.add(rows):
                result = publish_part(run, part, whole)
                published |= {part: result} if result else {}
                parts += 1
            note = f"{errors:,} errors, {parts} / {run.plan.num_parts} parts"
            progress.update(done + assembler.taken, note)
    return published


def _expected(
    labeled: Iterator[pa.Table], run: Run, assembler: PartAssembler
) -> Iterator[pa.Table]:
    """The same rows; the assembler knows the inputs of their parts before it gets them."""
    reader, known = PlanReader(run.plan), set[int]()
    for rows in labeled:
        for part in sorted(set(pc.unique(rows["part"]).to_pylist()) - known):
            assembler.expect(part, reader.read(part))
            known.add(part)
        yield rows


class _Labeler:
    """Labels parts in this process while that is quicker, else on Ray, which starts once."""

    def __init__(
        self,
        settings: ClassifySettings,
        bundle: StoredBundle,
        source: Source,
        resources: contextlib.ExitStack,
        *,
        started: float,
    ) -> None:
        self.started = started
        self.settings = settings
        self.bundle = bundle
        self.source = source
        self.resources = resources
        self.cluster: ClusterLabeler | None = None

    def label(self, run: Run, parts: Sequence[int]) -> Generator[pa.Table, None, None]:
        """Label rows of some parts, with their places; a row may come twice."""
        images = sum(map(run.plan.rows_of, parts))
        if self.cluster is None and images <= MAX_SMALL_RUN:
            from cnnray.cluster.classify.small_runs import SmallRunLabeler, may_run_here

            if may_run_here(self.settings):
                small = SmallRunLabeler(self.settings, self.bundle.load(), source=self.source)
                yield from small.label(run, parts)
                if small.is_whole:
                    return
        yield from self._on_cluster().label(run, parts)

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of how images were labelled."""
        from cnnray.cluster.inference.choices import engine_choice

        cluster = self.cluster
        engine = cluster.engine if cluster else None
        return {
            "engine": str(engine.choice if engine else engine_choice(self.settings)),
            "agreement": engine.agreement.fraction if engine and engine.agreement else None,
            "predicted_seconds": cluster.predicted_seconds if cluster else None,
        }

    def _on_cluster(self) -> ClusterLabeler:
        if self.cluster is None:
            from cnnray.cluster.classify.on_cluster import ClusterLabeler

            self.cluster = ClusterLabeler(
                self.settings,
                self.bundle,
                source=self.source,
                resources=self.resources,
                started=self.started,
            )
        return self.cluster


def _result(
    finished: Sequence[tuple[Run, RunTotals]],
    output: Store,
    settings: ClassifySettings,
    facts: dict[str, Any],
    *,
    seconds: float,
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
        "data": f"{output.uri}/{DATA_FOLDER}",
        "images_per_second": round(rows / seconds, 1),
        "seconds": round(seconds, 1),
        **facts,
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
