"""The classify job, its Ray started beside the imports and the model where it is sure to be needed.

Ray's processes take seconds to start, and so does torch with a model. So nothing here imports
torch, which is left to a thread. (The other way round, Ray in a thread, a job would not survive
SIGTERM in order: Ray's core keeps a handler of its own unless it starts in the main thread.)
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cnnray.cluster.core.session import ray_cluster
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import open_source
from cnnray.errors import CnnrayError
from cnnray.labeling.runs import TABLE_KEY
from cnnray.process import stop_on_sigterm
from cnnray.schema import BUNDLE_KEY
from cnnray.storage import open_store

if TYPE_CHECKING:
    from cnnray.models.bundle import Bundle


def classify(settings: ClassifySettings) -> dict[str, Any]:
    """``cnnray.cluster.classify.job.classify``."""
    bundle: Future[Bundle] | None = None
    with stop_on_sigterm(), ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as resources:
        if _has_work(settings):
            bundle = thread.submit(_load_bundle, settings.model)
            resources.enter_context(ray_cluster(settings.cluster))
        from cnnray.cluster.classify.job import classify

        return classify(settings, None if bundle is None else bundle.result())


def _load_bundle(uri: str) -> Bundle:
    from cnnray.models.bundle import load_bundle  # torch

    return load_bundle(open_store(uri))


def _has_work(settings: ClassifySettings) -> bool:
    """Whether this is a first run and what it needs is there; whatever is wrong, the job says."""
    if settings.dry_run:
        return False
    try:
        open_source(
            settings.input, format=settings.format, labelled=False, **settings.columns.options()
        )
        is_new = open_store(settings.output).head(TABLE_KEY) is None
        return is_new and open_store(settings.model).head(BUNDLE_KEY) is not None
    except CnnrayError:
        return False
