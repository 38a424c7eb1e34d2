"""The classify job, its Ray starting beside all that comes first where it is sure to be needed.

Ray's processes take seconds to start, and so do the imports, the model and the plan. So nothing
here imports torch, and the job itself is imported once Ray is under way.
"""

from __future__ import annotations

import contextlib
from typing import Any

from cnnray.cluster.runtime import RayStart, stop_on_sigterm
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import open_source
from cnnray.errors import CnnrayError
from cnnray.labeling.runs import TABLE_KEY
from cnnray.schema import BUNDLE_KEY
from cnnray.storage import open_store


def classify(settings: ClassifySettings) -> dict[str, Any]:
    """``cnnray.cluster.classify.classify``."""
    with stop_on_sigterm(), contextlib.closing(RayStart(settings.cluster)) as ray_start:
        if _has_work(settings):
            ray_start.begin()
        from cnnray.cluster.classify import classify

        return classify(settings, ray_start)


def _has_work(settings: ClassifySettings) -> bool:
    """Whether this is a first run and what it needs is there; whatever is wrong, the job says."""
    try:
        open_source(
            settings.input, format=settings.format, labelled=False, **settings.columns.options()
        )
        is_new = open_store(settings.output).head(TABLE_KEY) is None
        has_model = open_store(settings.model).head(BUNDLE_KEY) is not None
    except CnnrayError:
        return False
    return is_new and has_model and not settings.dry_run
