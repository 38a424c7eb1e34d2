"""The bench job: how fast labelling is on a user's own images and machine. It needs no Ray."""

from __future__ import annotations

import logging
import time
from typing import Any

from cnnray.cluster.classify.forecast import estimate, local_crew, measure
from cnnray.config import BenchSettings, ClassifySettings
from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import open_source
from cnnray.errors import DataError
from cnnray.labeling.measure import take_sample
from cnnray.models.bundle import load_bundle
from cnnray.storage import encode_json, open_store, split_uri

logger = logging.getLogger(__name__)

SECONDS = 120.0


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure the stages of labelling, forecast a run, and return both.

    Raises ``DataError`` when there are no images or none of the sample can be decoded, and
    ``SettingsError`` without the GPU that the settings ask for.
    """
    job = _as_job(settings)
    crew = local_crew(job)
    bundle = load_bundle(open_store(settings.model))
    source = open_source(
        settings.input, format=settings.format, labelled=False, **settings.columns.options()
    )
    started = time.perf_counter()
    listed, entries = take_sample(list_in_order(source), size=settings.sample)
    list_seconds = time.perf_counter() - started
    if not listed:
        raise DataError(f"no images at all in {settings.input}", hint="check --input")
    logger.info("%s images in %s", f"{listed:,}", settings.input)
    measured = measure(
        bundle, source, entries, job, list_seconds=list_seconds / listed, max_seconds=SECONDS
    )
    images = settings.images or listed
    result = {
        "listed": listed,
        "images": images,
        **estimate(measured, crew, job, images=images, listed=images),
    }
    if settings.output is not None:
        store, name = split_uri(settings.output)
        store.write(name, encode_json(result))
    return result


def _as_job(settings: BenchSettings) -> ClassifySettings:
    """The classify job that is asked about."""
    shared = (set(BenchSettings.model_fields) & set(ClassifySettings.model_fields)) - {"output"}
    return ClassifySettings(output="", **{name: getattr(settings, name) for name in shared})
