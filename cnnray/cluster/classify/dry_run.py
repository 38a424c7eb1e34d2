"""What classify would do, and what it would take: needs no Ray, writes nothing."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from cnnray.cluster.classify.forecast import estimate, local_crew, measure, sample_parts
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.labeling.commit import Run, missing_parts
from cnnray.labeling.log import read_log
from cnnray.labeling.measure import take_sample
from cnnray.labeling.runs import find_work, has_table, read_runs
from cnnray.models.bundle import Bundle
from cnnray.storage import Store

logger = logging.getLogger(__name__)

SAMPLE = 128
SECONDS = 20.0


def dry_run(
    settings: ClassifySettings,
    bundle: Bundle,
    source: Source,
    output: Store,
    *,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    list_inputs: Callable[[], Iterable[pa.Table]],
) -> dict[str, Any]:
    """Say what a run would label, and predict how long it takes, from a sample of it.

    Raises what ``classify`` does before it starts, and ``SettingsError`` without the GPU that the
    settings ask for.
    """
    crew = local_crew(settings)
    has_table(output, identity)
    started = time.perf_counter()
    with tempfile.TemporaryFile(prefix="cnnray-") as spill:
        work = find_work(
            read_runs(output, read_log(output)),
            config=config,
            list_inputs=list_inputs,
            on_changed=settings.on_changed,
            spill=spill,
        )
        if isinstance(work, Run):
            plan, entries = _of_open_run(work)
        else:
            _, entries = take_sample(work.tables(), size=SAMPLE)
            plan = {
                "run": None,
                "listed": work.listed,
                "duplicates": work.duplicates,
                "planned": work.rows,
                "parts": -(-work.rows // settings.part_rows),
            }
            logger.info(
                "%s images new of %s listed, %d parts",
                f"{work.rows:,}",
                f"{work.listed:,}",
                plan["parts"],
            )
    seconds = time.perf_counter() - started
    result = {"dry_run": True, **plan}
    if not plan["planned"]:
        return {**result, "predicted_seconds": round(seconds, 1)}
    measured = measure(
        bundle,
        source,
        entries,
        settings,
        list_seconds=seconds / plan["listed"] if plan["listed"] else 0.0,
        max_seconds=SECONDS,
    )
    return result | estimate(
        measured, crew, settings, images=plan["planned"], listed=plan["listed"]
    )


def _of_open_run(run: Run) -> tuple[dict[str, Any], pa.Table]:
    """What of an open run is missing, and a sample of it. What is new since comes after it."""
    missing = missing_parts(run)
    images = sum(map(run.plan.rows_of, missing))
    logger.info(
        "run %s is open: %s of %s images in %d of %d parts are missing; what is new since is not"
        " counted",
        run.id,
        f"{images:,}",
        f"{run.plan.rows:,}",
        len(missing),
        run.plan.num_parts,
    )
    plan = {
        "run": run.id,
        "listed": 0,
        "duplicates": run.plan.duplicates,
        "planned": images,
        "parts": len(missing),
    }
    return plan, sample_parts(run, missing, size=SAMPLE)
