"""Trials as Ray Tune runs them: what one does, where its settings come from, what became of it.

What is known of a trial is in its folder, as JSON, and nowhere else. Ray Tune's own state, which is
pickled, goes to a temporary folder and is never read. A search that goes on proposes its points
anew; trials that are over then only repeat what they reported, which is what the scheduler judges
the others by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray.tune
from ray.tune.search import Searcher

from cnnray.cluster.core.failures import last_line
from cnnray.cluster.train.job import train
from cnnray.cluster.train.plan import run_folder
from cnnray.config import TrainSettings
from cnnray.errors import ModelError, NonFiniteLossError, SettingsError
from cnnray.models.bundle import DOCUMENT_KEY
from cnnray.storage import Store
from cnnray.training.checkpoints import load_latest
from cnnray.tuning.search import Search
from cnnray.tuning.space import Point, describe
from cnnray.tuning.trials import Trial, begin_trial, load_trial, save_trial, score_of, trial_store

logger = logging.getLogger(__name__)

SCORE, EPOCH = "score", "epoch"


@dataclass(frozen=True)
class TrialTask:
    """One trial; it travels to where it runs."""

    output: Store  # the search's
    point: Point
    settings: TrainSettings
    metric: str

    def load(self) -> Trial | None:
        """Its record, or None where it is not over."""
        return load_trial(self.output, self.point)

    def save(self, status: Literal["done", "stopped", "failed"], error: str | None = None) -> Trial:
        """Make its record from its last checkpoint, and write it."""
        checkpoint = load_latest(run_folder(self.settings))
        trial = Trial(self.point, status, error=error)
        if checkpoint is not None and checkpoint.history:
            trial = replace(
                trial,
                history=checkpoint.history,
                best_epoch=checkpoint.best_epoch,
                parameters=sum(tensor.numel() for tensor in checkpoint.model.values()),
                workers=self.settings.scaling.max_workers,
            )
        save_trial(self.output, trial)
        return trial

    def report(self, epochs: Iterable[Mapping[str, Any]]) -> None:
        """Tell Ray Tune of epochs; it ends the trial here when it is to go no further."""
        for epoch in epochs:
            score = score_of(epoch, self.metric)
            self._report(-math.inf if score is None else score, epoch["epoch"] + 1)

    def report_failure(self) -> None:
        """Tell Ray Tune that this is worse than anything."""
        self._report(-math.inf, 0)

    def _report(self, score: float, epoch: int) -> None:
        ray.tune.report({SCORE: score, EPOCH: epoch})


def run_trial(task: TrialTask) -> None:
    """Train at a point, inside a trial of Ray Tune, from where an earlier try was ended.

    Settings that cannot be trained with are a result; whatever else stops it is raised.
    """
    trial = task.load()
    if trial is not None:
        task.report(trial.history)
    else:
        trial = _train(task)
    if trial.status == "failed":
        task.report_failure()


def _train(task: TrialTask) -> Trial:
    begun = load_latest(run_folder(task.settings))
    task.report(begun.history if begun else ())
    try:
        if trial_store(task.output, task.point).head(DOCUMENT_KEY) is None:
            train(task.settings, on_epoch=lambda result: task.report([result.to_dict()]))
    except (NonFiniteLossError, ModelError, SettingsError) as error:
        return task.save("failed", str(error))
    return task.save("done")


class TrialSearcher(Searcher):  # type: ignore[misc]
    """Proposes points to Ray Tune, and writes down what became of them."""

    def __init__(
        self,
        search: Search,
        output: Store,
        *,
        settings: Callable[[Point], TrainSettings],
        metric: str,
    ) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.search = search
        self.output = output
        self.settings = settings
        self.ranked_by = metric
        self.points: list[Point] = []
        self.lost: list[Point] = []
        self.tasks: dict[str, tuple[int, TrialTask]] = {}  # and their numbers

    def suggest(self, trial_id: str) -> Any:
        """The next point, noted down before it is tried."""
        while (point := self.search.propose()) is not None:
            self.points.append(point)
            begin_trial(self.output, point)
            logger.info("trial %d: %s", len(self.points), describe(point))
            try:
                task = TrialTask(self.output, point, self.settings(point), self.ranked_by)
            except SettingsError as error:  # values that do not go together
                save_trial(self.output, Trial(point, "failed", error=str(error)))
                self.search.tell(point, None)
                continue
            self.tasks[trial_id] = len(self.points), task
            return {"task": task}
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Keep the record of a trial that the scheduler stopped; tell the search of the score."""
        number, task = self.tasks[trial_id]
        trial = task.load()
        if trial is None and error:
            self.lost.append(task.point)
        elif trial is None:
            trial = task.save("stopped")
        score = trial.score(self.ranked_by) if trial else None
        self.search.tell(task.point, score)
        status = trial.status if trial else "lost"
        reached = "" if score is None else f", {self.ranked_by} {abs(score):.4f}"
        logger.info("trial %d %s%s", number, status, reached)

    def trials(self) -> list[Trial]:
        """The records of all points that were proposed, as far as they are over."""
        found = (load_trial(self.output, point) for point in self.points)
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
        number, task = self.searcher.tasks[trial.trial_id]
        if math.isfinite(result[SCORE]):
            logger.info(
                "trial %d epoch %d/%d: %s %.4f",
                number,
                result[EPOCH],
                task.settings.epochs,
                task.metric,
                abs(result[SCORE]),
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what a trial was lost by."""
        error = trial.get_pickled_error() or trial.get_error()
        logger.error("%s", last_line(error) if isinstance(error, Exception) else error)
