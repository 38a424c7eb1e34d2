"""The verify job: proves a table of labels, or ends an open run. It needs no Ray."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

from cnnray.config import VerifySettings
from cnnray.errors import ConflictError, DataError, MissingObjectError
from cnnray.labeling.commit import seal_run
from cnnray.labeling.log import read_log
from cnnray.labeling.runs import TABLE_KEY, read_runs
from cnnray.labeling.verify import verify_table
from cnnray.schema import labels_schema
from cnnray.storage import Store, open_store, read_json

logger = logging.getLogger(__name__)


def verify(settings: VerifySettings) -> dict[str, Any]:
    """Prove a table, after ending its open run if ``abort`` says so, and return what was found.

    Raises ``DataError`` when there is no table and ``ConflictError`` when something is wrong.
    """
    started = time.perf_counter()
    store = open_store(settings.output)
    try:
        identity = read_json(store, TABLE_KEY)
    except MissingObjectError:
        raise DataError(f"no table of labels at {store.uri}", hint="check --output") from None
    if settings.abort:
        _abort(store, embeddings=identity["embeddings"])
    proof = verify_table(store)
    result = {
        **asdict(proof),
        "ok": not proof.problems,
        "seconds": round(time.perf_counter() - started, 1),
    }
    for problem in proof.problems:
        logger.error("%s", problem)
    if proof.problems:
        raise ConflictError(
            f"{len(proof.problems)} problems in {store.uri}, {proof.problems[0]}",
            hint="restore those objects from a version of the bucket, or label into a new --output",
            result=result,
        )
    state = f"run {proof.open_run} is open" if proof.open_run else "no run is open"
    logger.info("%s rows in %d runs are whole; %s", f"{proof.rows:,}", proof.runs, state)
    return result


def _abort(store: Store, *, embeddings: bool) -> None:
    for run in read_runs(store, read_log(store)):
        if run.commit is None:
            totals = seal_run(run, labels_schema(embeddings=embeddings).empty_table())
            logger.info("run %s ended: %d of %d parts sealed", run.id, totals.sealed, totals.parts)
            return
    logger.info("no run is open")
