"""What labelling would take, measured on a sample: needs no Ray, and writes no labels.

``classify --dry_run`` asks it of what is new to a table, the bench job of a whole collection.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cnnray.cluster.classify.forecast import estimate, local_crew, measure, sample_parts
from cnnray.config import BenchSettings, ClassifySettings, LabelingSettings
from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import DataError
from cnnray.labeling.commit import Run, missing_parts
from cnnray.labeling.log import read_log
from cnnray.labeling.measure import take_sample
from cnnray.labeling.runs import find_work, has_table, read_runs
from cnnray.models.bundle import Bundle, load_bundle
from cnnray.storage import Store, encode_json, open_store, split_uri

logger = logging.getLogger(__name__)

SAMPLE = 128
SECONDS = 20.0
BENCH_SECONDS = 120.0
"""What measuring may take, at about: where someone waits for a run, and where it is the job."""


@dataclass(frozen=True)
class Work:
    """Images to label, with a sample of them; ``listed`` had to be listed to find them."""

    images: int
    listed: int
    sample: pa.Table
    facts: Mapping[str, Any]


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

    def find() -> Work:
        has_table(output, identity)
        return _find_new(settings, output, config=config, list_inputs=list_inputs)

    return {"dry_run": True, **_predict(settings, bundle, source, find, max_seconds=SECONDS)}


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure the stages of labelling, forecast a run, and return both.

    Raises ``DataError`` when there are no images or none of the sample can be decoded, and
    ``SettingsError`` without the GPU that the settings ask for.
    """
    bundle = load_bundle(open_store(settings.model))
    source = open_source(
        settings.input, format=settings.format, labelled=False, **settings.columns.options()
    )
    result = _predict(
        settings, bundle, source, lambda: _find_all(settings, source), max_seconds=BENCH_SECONDS
    )
    if settings.output is not None:
        store, name = split_uri(settings.output)
        store.write(name, encode_json(result))
    return result


def _predict(
    settings: LabelingSettings,
    bundle: Bundle,
    source: Source,
    find: Callable[[], Work],
    *,
    max_seconds: float,
) -> dict[str, Any]:
    crew = local_crew(settings)
    started = time.perf_counter()
    work = find()
    seconds = time.perf_counter() - started
    if not work.images:
        return {**work.facts, "predicted_seconds": round(seconds, 1)}
    measured = measure(
        bundle,
        source,
        work.sample,
        settings,
        list_seconds=seconds / work.listed if work.listed else 0.0,
        max_seconds=max_seconds,
    )
    predicted = estimate(measured, crew, settings, images=work.images, listed=work.listed)
    return {**work.facts, **predicted}


def _find_all(settings: BenchSettings, source: Source) -> Work:
    """Every image that is listed, or as many more or fewer as are asked about."""
    listed, sample = take_sample(list_in_order(source), size=settings.sample)
    if not listed:
        raise DataError(f"no images at all in {settings.input}", hint="check --input")
    logger.info("%s images in %s", f"{listed:,}", settings.input)
    images = settings.images or listed
    return Work(images, listed, sample, facts={"listed": listed, "images": images})


def _find_new(
    settings: ClassifySettings,
    output: Store,
    *,
    config: Mapping[str, Any],
    list_inputs: Callable[[], Iterable[pa.Table]],
) -> Work:
    """What a run would label: what is not in the table yet, or what an open run has left."""
    with tempfile.TemporaryFile(prefix="cnnray-") as spill:
        work = find_work(
            read_runs(output, read_log(output)),
            config=config,
            list_inputs=list_inputs,
            on_changed=settings.on_changed,
            spill=spill,
        )
        if isinstance(work, Run):
            return _left_of(work)
        _, sample = take_sample(work.tables(), size=SAMPLE)
    facts = {
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
        facts["parts"],
    )
    return Work(work.rows, work.listed, sample, facts)


def _left_of(run: Run) -> Work:
    """What of an open run is missing. What is new since comes after it."""
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
    facts = {
        "run": run.id,
        "listed": 0,
        "duplicates": run.plan.duplicates,
        "planned": images,
        "parts": len(missing),
    }
    return Work(images, listed=0, sample=sample_parts(run, missing, size=SAMPLE), facts=facts)
