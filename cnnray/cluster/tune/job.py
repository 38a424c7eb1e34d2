"""The tune job: Ray Tune runs trainings over a space of settings; the best bundle is kept."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from cnnray import __version__
from cnnray.cluster.core.growth import fit, gather, read_capacity
from cnnray.cluster.core.resources import Capacity, plan_trials, worker_bundles
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.train.job import train
from cnnray.cluster.train.plan import claim_settings, run_folder
from cnnray.cluster.tune.trials import SCORE, TrialLog, TrialSearcher, run_trial
from cnnray.config import (
    ScalingSettings,
    TrainSettings,
    TuneSettings,
    build_settings,
    check_names,
)
from cnnray.datasets.manifest import read_manifest
from cnnray.errors import DataError, IncompleteError, SettingsError, UsageError
from cnnray.models.bundle import DOCUMENT_KEY, WEIGHTS_KEY, delete_bundle, load_bundle
from cnnray.storage import Store, open_store, sha256, split_uri
from cnnray.training.checkpoints import delete_checkpoints
from cnnray.tuning.report import REPORT_KEY, write_report
from cnnray.tuning.search import DEFAULT, open_search
from cnnray.tuning.space import (
    Choice,
    Point,
    Space,
    describe,
    describe_space,
    merge,
    parse_space,
    point_name,
)
from cnnray.tuning.trials import Trial, begun_points, rank, trial_store

logger = logging.getLogger(__name__)

SETTINGS_KEY = "tuning.json"
GATHER_SECONDS = 120.0
"""Without a new node, after which a search starts with fewer trials at a time than it could run."""

OWN = {"config", "data", "output", "run_name", "overwrite", "order_log"}
OWN |= {"cluster", "scaling", "ingest", "checkpoint", "tracking"}
"""Settings of the whole job, which no trial may choose and a continuation may change."""


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Try points of a space, and write the best one's bundle. Returns the job's result.

    The same command goes on with a search that was ended, and with more ``trials`` extends one.
    Raises ``UsageError`` before anything is started for mistakes that can be known by then,
    ``ConflictError`` when there is another search at the output, and ``IncompleteError`` when no
    trial came to its end, but another try may help.
    """
    started = time.perf_counter()
    output, space = open_store(settings.output), _read_space(settings.space)
    manifest = read_manifest(open_store(settings.data))
    if manifest.splits["val"].num_samples == 0:
        raise DataError(
            f"{settings.data} has no validation split to compare trials on",
            hint="pack it again with --split.val",
        )
    _check_points(settings, space)
    known = _claim_output(settings, output, space=space, dataset=sha256(manifest.to_bytes()))
    # Where a trial is stopped, Ray Train gives back what it had reserved once the dashboard's
    # interfaces say that it is gone; without them the CPUs would be lost to the next trials.
    with ray_cluster(settings.cluster, dashboard=True):
        settings, concurrent = plan_concurrency(settings)
        searcher = _search(settings, space, output, concurrent=concurrent, known=known)
        trials = rank(searcher.trials(), settings.metric)
        _require_whole_trial(trials, lost=len(searcher.lost))
        _keep_bundle(trials[0], settings, output)
    result = _finish(trials, settings, space=space, output=output)
    seconds = round(time.perf_counter() - started, 1)
    return result | {"lost": len(searcher.lost), "seconds": seconds}


def _read_space(path: str) -> Space:
    store, key = split_uri(path)
    try:
        return parse_space(store.read(key).decode(), where=path)
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text") from None


def trial_settings(settings: TuneSettings, point: Point) -> TrainSettings:
    """The settings of the trial at a point. Raises ``SettingsError`` for values that do not fit."""
    output = trial_store(open_store(settings.output), point).uri
    own = {"output": output, "order_log": None, "overwrite": False}
    values = settings.model_dump(include=set(TrainSettings.model_fields))
    found = build_settings(TrainSettings, merge(values, point) | own, where=describe(point))
    return found.with_absolute_paths()  # a trial works in a folder of its own


def _check_points(settings: TuneSettings, space: Space) -> None:
    """Raise ``SettingsError`` for names that are none, and for values that no trial could have.

    Values are tried one by one: points at which some do not go together are failed trials.
    """
    open_search(settings.search, space, trials=1, seed=0)
    check_names(TrainSettings, space, where=settings.space)
    for name, values in space.items():
        if name.partition(".")[0] in OWN:
            raise SettingsError(f"{settings.space}: {name} is a setting of the job, not of a trial")
        for value in values.values if isinstance(values, Choice) else (values.low, values.high):
            trial_settings(settings, {name: value})


def _claim_output(
    settings: TuneSettings, output: Store, *, space: Space, dataset: str
) -> list[Point]:
    """Make sure that what is at output is this search, with trials left to do, or nothing.

    Returned are the points that have been begun.
    """
    if settings.overwrite:
        delete_bundle(output)
        output.delete(SETTINGS_KEY)
        for stored in list(output.list("trials/")):
            output.delete(stored.key)
    trained = set(TrainSettings.model_fields) - OWN
    identity = settings.model_dump(mode="json", include=trained)
    identity |= {"dataset_sha256": dataset, "space": describe_space(space)}
    has_bundle = output.head(DOCUMENT_KEY) is not None
    if has_bundle and output.head(SETTINGS_KEY) is None:
        raise UsageError(
            f"{output.uri} holds a bundle already",
            hint="choose another --output, or --overwrite",
        )
    claim_settings(
        output,
        SETTINGS_KEY,
        identity,
        defaults={},
        what=f"the search at {output.uri}",
        hint="choose another --output, or --overwrite to start anew",
    )
    begun = begun_points(output)
    if has_bundle and len(begun) >= settings.trials:
        raise UsageError(
            f"{output.uri} holds the best of {len(begun)} trials already",
            hint="raise --trials to go on, choose another --output, or --overwrite",
        )
    return begun


def plan_concurrency(settings: TuneSettings) -> tuple[TuneSettings, int]:
    """How many trials run at a time, and settings that give each its part of the cluster.

    A cluster that can grow is asked for room for all of them, and for one it is waited as long as
    it takes. Raises ``SettingsError`` where one trial will never fit, and ``IncompleteError``.
    """
    scaling = settings.scaling
    trial = worker_bundles(scaling)

    def plan(capacity: Capacity) -> tuple[int, ScalingSettings]:
        return plan_trials(
            scaling, capacity, trials=settings.trials, concurrent=settings.max_concurrent
        )

    need = trial[0]
    concurrent, shared = fit(plan, need=need, bundles=lambda _: trial, cluster=settings.cluster)
    capacity = read_capacity()
    wanted, _ = plan(capacity.largest(need))
    if (
        capacity.max_more
        and wanted > plan_trials(scaling, capacity, trials=settings.trials, concurrent=None)[0]
    ):
        gather(trial * wanted, cluster=settings.cluster, seconds=GATHER_SECONDS)
        concurrent, shared = plan(read_capacity())
    return settings.model_copy(update={"scaling": shared}), concurrent


def _search(
    settings: TuneSettings, space: Space, output: Store, *, concurrent: int, known: Sequence[Point]
) -> TrialSearcher:
    """Run all trials; those that are over already only repeat what they reported."""
    search = open_search(
        settings.search, space, trials=settings.trials, seed=settings.seed, known=known
    )
    searcher = TrialSearcher(
        search,
        output,
        settings=functools.partial(trial_settings, settings),
        metric=settings.metric,
    )
    logger.info(
        "tuning %s over %s: %d trials, %d at a time, %d known from before",
        settings.metric,
        ", ".join(space),
        settings.trials,
        concurrent,
        len(known),
    )
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    here = f"node:{ray.util.get_node_ip_address()}"  # its state is in a folder of this machine
    with tempfile.TemporaryDirectory(prefix="cnnray-tune-") as ray_state:
        ray.tune.Tuner(
            ray.tune.with_resources(
                lambda config: run_trial(config["task"]), {"CPU": 0, here: 0.001}
            ),
            tune_config=ray.tune.TuneConfig(
                metric=SCORE,
                mode="max",
                search_alg=searcher,
                scheduler=_scheduler(settings),
                num_samples=settings.trials,
                max_concurrent_trials=concurrent,
            ),
            run_config=ray.tune.RunConfig(
                name="cnnray",
                storage_path=ray_state,
                callbacks=[TrialLog(searcher)],
                verbose=0,
            ),
        ).fit()
    return searcher


def _scheduler(settings: TuneSettings) -> TrialScheduler:
    if settings.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        max_t=settings.epochs + 1,  # at max_t a trial would be ended before its bundle is written
        grace_period=min(settings.grace_epochs, settings.epochs),
        reduction_factor=settings.reduction_factor,
    )


def _require_whole_trial(trials: Sequence[Trial], *, lost: int) -> None:
    """Raise what is to be said where none, of which the best comes first, came to its end."""
    if trials and trials[0].status == "done":
        return
    failures = [trial.error for trial in trials if trial.error is not None]
    if failures and not lost:
        raise UsageError(f"no trial came to its end: {failures[0]}")
    raise IncompleteError(
        f"{lost} trials were lost, and none came to its end",
        hint="see the errors above; the same command goes on",
    )


def _keep_bundle(best: Trial, settings: TuneSettings, output: Store) -> None:
    """Put the best bundle at output: a copy, or that of a longer training with its settings."""
    delete_bundle(output)
    if settings.refit_epochs:
        own = {"output": output.uri, "run_name": f"refit-{best.name}"}
        chosen = trial_settings(settings, best.point).model_copy(
            update=own | {"epochs": settings.refit_epochs}
        )
        train(chosen)
        return
    source = trial_store(output, best.point)
    for key in (WEIGHTS_KEY, DOCUMENT_KEY):  # the document last: without it there is no bundle
        output.create(key, source.read(key))


def _finish(
    trials: Sequence[Trial], settings: TuneSettings, *, space: Space, output: Store
) -> dict[str, Any]:
    """Write the table and the report, remove what is no longer needed, say what came out."""
    best = trials[0]
    facts = {
        "dataset": settings.data,
        "space": ", ".join(describe_space(space)),
        "search": f"{settings.search}, seed {settings.seed}, scheduler {settings.scheduler}",
        "cnnray": __version__,
    }
    title = f"{len(trials)} trials on {settings.data}"
    write_report(output, trials, space, title=title, facts=facts)
    for trial in trials:
        delete_checkpoints(run_folder(trial_settings(settings, trial.point)))
    counts = Counter(trial.status for trial in trials)
    return {
        "best": best.point,
        "trial": best.name,
        "bundle": output.uri,
        "model": load_bundle(output).digest,
        settings.metric: best.value(settings.metric),
        "default": {trial.name: trial.value(settings.metric) for trial in trials}.get(
            point_name(DEFAULT)
        ),
        "trials": len(trials),
        **{status: counts[status] for status in ("done", "stopped", "failed")},
        "report": f"{output.uri}/{REPORT_KEY}",
    }
