"""Trials as Ray Tune runs them: what one does, where its settings come from, what became of it.

What is known of a trial is in its folder, as JSON, and nowhere else. Ray Tune's own state, which is
pickled, goes to a temporary folder and is never read. A search that goes on proposes its points
anew; trials that are over then only repeat what they reported, which is what the scheduler judges
the others by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.tune
from ray.tune.search import Searcher

from cnnray.cluster.runtime import last_line
from cnnray.cluster.train import train
from cnnray.cluster.train_plan import run_folder
from cnnray.config import TrainSettings
from cnnray.errors import ModelError, NonFiniteLossError, SettingsError
from cnnray.models.bundle import DOCUMENT_KEY
from cnnray.storage import Store
from cnnray.training.checkpoints import load_latest
from cnnray.tuning.search import Search
from cnnray.tuning.space import Point, describe
from cnnray.tuning.trials import Trial, begin_trial, load_trial, save_trial, score_of, trial_store

logger = logging.getLogger(__name__)

SCORE = "score"


@dataclass(frozen=True)
class TrialPlan:
    """What all trials share; it travels to each of them."""

    output: Store
    settings: Callable[[Point], TrainSettings]
    metric: str


def run_trial(plan: TrialPlan, point: Point) -> None:
    """Train at a point, inside a trial of Ray Tune, from where an earlier try was ended.

    Settings that cannot be trained with are a result; whatever else stops it is raised.
    """
    trial = load_trial(plan.output, point)
    if trial is not None:
        for epoch in trial.history:
            _report(plan, epoch)
        return
    settings = plan.settings(point)
    begun = load_latest(run_folder(settings))
    for epoch in begun.history if begun else ():
        _report(plan, epoch)
    try:
        if trial_store(plan.output, point).head(DOCUMENT_KEY) is None:
            train(settings, on_epoch=lambda result: _report(plan, result.to_dict()))
    except (NonFiniteLossError, ModelError, SettingsError) as error:
        save_trial(plan.output, read_trial(plan, point, status="failed", error=str(error)))
    else:
        save_trial(plan.output, read_trial(plan, point, status="done"))


def read_trial(plan: TrialPlan, point: Point, *, status: Any, error: str | None = None) -> Trial:
    """A trial as its last checkpoint has it."""
    settings = plan.settings(point)
    checkpoint = load_latest(run_folder(settings))
    if checkpoint is None or not checkpoint.history:
        return Trial(point, status, error=error)
    return Trial(
        point,
        status,
        history=checkpoint.history,
        best_epoch=checkpoint.best_epoch,
        parameters=sum(tensor.numel() for tensor in checkpoint.model.values()),
        workers=settings.scaling.max_workers,
        error=error,
    )


def _report(plan: TrialPlan, epoch: dict[str, Any]) -> None:
    """Tell Ray Tune of an epoch; it ends the trial here when it is to go no further."""
    score = score_of(epoch, plan.metric)
    ray.tune.report({SCORE: -math.inf if score is None else score, "epoch": epoch["epoch"] + 1})


class TrialSearcher(Searcher):
    """Proposes points to Ray Tune, and writes down what became of them."""

    def __init__(self, search: Search, plan: TrialPlan) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.search = search
        self.plan = plan
        self.points: dict[str, Point] = {}
        self.lost: list[Point] = []

    def suggest(self, trial_id: str) -> Any:
        """The next point, noted down before it is tried."""
        point = self.search.propose()
        if point is None:
            return Searcher.FINISHED
        begin_trial(self.plan.output, point)
        self.points[trial_id] = point
        logger.info("trial %d: %s", len(self.points), describe(point))
        return {"point": point}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Keep the record of a trial that the scheduler stopped; tell the search of the score."""
        point = self.points[trial_id]
        trial = load_trial(self.plan.output, point)
        if trial is None and error:
            self.lost.append(point)
        elif trial is None:
            trial = read_trial(self.plan, point, status="stopped")
            save_trial(self.plan.output, trial)
        score = trial.score(self.plan.metric) if trial else None
        self.search.tell(point, score)
        number = list(self.points).index(trial_id) + 1
        status = trial.status if trial else "lost"
        reached = "" if score is None else f", {self.plan.metric} {abs(score):.4f}"
        logger.info("trial %d %s%s", number, status, reached)

    def trials(self) -> list[Trial]:
        """The records of all points that were proposed, as far as they are over."""
        found = (load_trial(self.plan.output, point) for point in self.points.values())
        return [trial for trial in found if trial is not None]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders say it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see ``save``."""


class TrialLog(ray.tune.Callback):  # type: ignore[misc]
    """Lines for the log, as trials go on."""

    def __init__(self, searcher: TrialSearcher) -> None:
        self.searcher = searcher

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say what an epoch gave."""
        number = list(self.searcher.points).index(trial.trial_id) + 1
        metric = self.searcher.plan.metric
        logger.info(
            "trial %d epoch %d: %s %.4f", number, result["epoch"], metric, abs(result[SCORE])
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what a trial was lost by."""
        error = trial.get_pickled_error() or trial.get_error()
        logger.error("%s", last_line(error) if isinstance(error, Exception) else error)
