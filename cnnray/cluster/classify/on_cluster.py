"""Labelling on Ray: the run's engine is checked once, then its units stream through actors."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import pyarrow as pa

from cnnray.cluster.classify.actors import LabelJob
from cnnray.cluster.classify.forecast import measure_run, predict_run
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import MAX_UNITS, map_units
from cnnray.cluster.inference.choices import decoded_block_bytes, engine_choice
from cnnray.cluster.inference.engine_check import CheckedEngine, check_engine
from cnnray.cluster.inference.stages import plan_stages
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.labeling.commit import Run
from cnnray.labeling.units import plan_units
from cnnray.models.bundle import StoredBundle
from cnnray.storage import open_store


class ClusterLabeler:
    """Labels the missing parts of runs; Ray is started or joined for the first of them.

    Ray lives as long as ``resources``; ``started`` is when the job did (``time.perf_counter``).
    """

    def __init__(
        self,
        settings: ClassifySettings,
        bundle: StoredBundle,
        *,
        source: Source,
        resources: contextlib.ExitStack,
        started: float,
    ) -> None:
        self.settings = settings
        self.bundle = bundle
        self.model = open_store(settings.model)
        self.source = source
        self.resources = resources
        self.started = started
        self.engine: CheckedEngine | None = None
        self.predicted_seconds: float | None = None  # of the job, from the last large run

    def label(self, run: Run, parts: Sequence[int]) -> Iterator[pa.Table]:
        """Label rows of some parts, with their places, as workers finish them."""
        settings = self.settings
        job = LabelJob(self.model, self.source, run, settings)
        measured = measure_run(self.bundle, self.source, run, parts, settings)
        self.resources.enter_context(ray_cluster(settings.cluster))
        if self.engine is None:
            self.engine = check_engine(job, engine_choice(settings))
        job = dataclasses.replace(job, engine=self.engine.prepared)
        stages = plan_stages(job, settings)
        if measured is not None:
            images = sum(map(run.plan.rows_of, parts))
            predicted = predict_run(measured, stages, settings, images=images)
            self.predicted_seconds = round(time.perf_counter() - self.started + predicted, 1)
        units = plan_units(
            run.plan,
            parts,
            chunk_rows=settings.chunk_rows,
            workers=stages[0].max_workers,
            max_units=MAX_UNITS,
        )
        yield from map_units(
            [unit.to_table() for unit in units],
            stages,
            stall_seconds=settings.cluster.stall_seconds,
            block_bytes=decoded_block_bytes(self.bundle.spec.preprocessing, settings),
        )
