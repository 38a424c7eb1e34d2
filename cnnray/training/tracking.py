"""The curves of a run go elsewhere, too: to MLflow, to TensorBoard, to both.

Tracking never stops a training. A tracker that fails is warned of once; what it lacks is written
with a later epoch, or at the end from the history.

    <run>/tracking.json   what the run is called, and its id in MLflow: a run that goes on is one
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cnnray.errors import hide_credentials
from cnnray.storage import Store, encode_json, read_json
from cnnray.training.loop import EpochResult
from cnnray.training.mlflow_tracker import check_mlflow, open_mlflow
from cnnray.training.tensorboard_tracker import check_tensorboard, open_tensorboard
from cnnray.training.trackers import Epoch, Tracker, root_reason

logger = logging.getLogger(__name__)

TRACKING_KEY = "tracking.json"

END_SECONDS = 600.0
"""What the end of a run waits for its trackers, at most: weights may be on their way."""


class Tracking:
    """The trackers of a run. One thread does what they do; only the end waits for it."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = trackers
        self.history: list[Epoch] = []  # of this process
        self.warned: set[str] = set()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self.writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.fail()
        self.thread.shutdown(wait=False)

    def epoch(self, result: EpochResult) -> None:
        """Write an epoch, and what is missing before it, soon: returns at once."""
        self.history.append(result.to_dict())
        # One that is slow gets this epoch with the next: tries must not pile up.
        if self.trackers and (self.writing is None or self.writing.done()):
            history = tuple(self.history)
            self.writing = self.thread.submit(
                self._each, lambda tracker: tracker.write_epochs(history), "it is tried again"
            )

    def finish(self, result: Mapping[str, Any], *, history: Sequence[Epoch]) -> None:
        """Write what is missing of the run's whole history, and the job's result."""
        self._end(history, lambda tracker: tracker.finish(result))

    def fail(self) -> None:
        """Write what is missing; the run did not get to its end."""
        self._end(self.history, lambda tracker: tracker.fail())

    def _end(self, history: Sequence[Epoch], close: Callable[[Tracker], None]) -> None:
        def end(tracker: Tracker) -> None:
            tracker.write_epochs(history)
            close(tracker)

        if not self.trackers:
            return
        self.warned.clear()  # what is missing for good is said in any case
        try:
            self.thread.submit(self._each, end, "it stays incomplete").result(timeout=END_SECONDS)
        except TimeoutError:
            logger.warning("tracking is given up: not done in %.0f s", END_SECONDS)

    def _each(self, action: Callable[[Tracker], None], prospect: str) -> None:
        for tracker in self.trackers:
            try:
                action(tracker)
            except Exception as error:  # whatever it is, the training is worth more
                if tracker.name not in self.warned:
                    self.warned.add(tracker.name)
                    logger.warning("%s, %s: %s", tracker.name, prospect, root_reason(error))


def check_tracking(mlflow: str | None, experiment: str, tensorboard: str | None) -> None:
    """Raise ``SettingsError`` unless the packages are there and MLflow answers, within seconds."""
    if tensorboard is not None:
        check_tensorboard()
    if mlflow is not None:
        check_mlflow(mlflow, experiment)


def open_tracking(
    run: Store,
    *,
    name: str,
    parameters: Mapping[str, Any],
    mlflow: str | None,
    experiment: str,
    tensorboard: str | None,
) -> Tracking:
    """Begin to track the run in folder ``run``, or go on as its ``tracking.json`` says.

    A new one is called ``name`` and a few random digits; ``parameters`` are its settings, nested.
    Raises ``SettingsError`` when MLflow or the folder for TensorBoard cannot be used.
    """
    if mlflow is None and tensorboard is None:
        return Tracking()
    known = {} if run.head(TRACKING_KEY) is None else read_json(run, TRACKING_KEY)
    known.setdefault("name", f"{name}-{secrets.token_hex(3)}")
    flat = dict(_flatten(parameters))
    trackers: list[Tracker] = []
    if tensorboard is not None:
        trackers.append(open_tensorboard(Path(tensorboard) / known["name"], flat))
    if mlflow is not None:
        tracker = open_mlflow(
            mlflow,
            known.get("mlflow_run_id"),
            experiment=experiment,
            run_name=known["name"],
            parameters=flat,
        )
        known["mlflow_run_id"] = tracker.run_id
        trackers.append(tracker)
    run.write(TRACKING_KEY, encode_json(known))
    for each in trackers:
        logger.info("the run is tracked as %s by %s", known["name"], each.name)
    return Tracking(trackers)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hide_credentials(str(value))
