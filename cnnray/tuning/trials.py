"""What each trial gave: one JSON file beside its bundle, and all of them as one table.

<output>/tuning.json              what is searched: settings, space, metric
<output>/trials/<name>/           the bundle of a trial, as ``train`` writes it
<output>/trials/<name>/point.json where in the space it is, written before it begins
<output>/trials/<name>/trial.json what it gave, written once it is over
<output>/trials.parquet           the table of all trials, best first
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from cnnray.errors import MissingObjectError, StorageError
from cnnray.storage import Store, child, encode_json, read_json
from cnnray.tuning.space import Point, Space, point_name

POINT_KEY, RECORD_KEY = "point.json", "trial.json"
METRICS = {"val_accuracy": 1.0, "val_loss": -1.0}
"""What trials may be ranked by, and the sign that makes greater better."""


@dataclass(frozen=True)
class Trial:
    """One point of the space, and what training there gave."""

    point: Point
    status: Literal["done", "stopped", "failed"]
    history: tuple[dict[str, Any], ...] = ()  # one EpochResult.to_dict() an epoch
    best_epoch: int | None = None  # whose weights the bundle has, 0-based
    parameters: int | None = None
    workers: int = 1
    error: str | None = None

    @property
    def name(self) -> str:
        """Its folder's."""
        return point_name(self.point)

    @property
    def seconds(self) -> float:
        """Of training and validation, over all workers."""
        return self.workers * sum(float(epoch["seconds"]) for epoch in self.history)

    def value(self, metric: str) -> float | None:
        """A metric of the epoch whose weights the bundle has; None where there is none."""
        return None if self.best_epoch is None else self.history[self.best_epoch].get(metric)

    def score(self, metric: str) -> float | None:
        """What trials are ranked by: greater is better; None where there is none."""
        if self.best_epoch is None:
            return None
        return score_of(self.history[self.best_epoch], metric)


def score_of(epoch: Mapping[str, Any], metric: str) -> float | None:
    """An epoch's metric, greater is better; None where it is missing or not finite."""
    value = epoch[metric]
    return METRICS[metric] * value if value is not None and math.isfinite(value) else None


def trial_store(output: Store, point: Point) -> Store:
    """The folder of the trial at a point."""
    return child(output, f"trials/{point_name(point)}")


def begin_trial(output: Store, point: Point) -> None:
    """Leave a note that there is a trial at this point."""
    trial_store(output, point).create(POINT_KEY, encode_json(point))


def begun_points(output: Store) -> list[Point]:
    """The points of all trials that have been begun, in the order of their names."""
    trials = child(output, "trials")
    try:
        folders = [child(trials, name) for name in trials.list_folders()]
    except MissingObjectError:
        return []
    return [read_json(folder, POINT_KEY) for folder in folders if folder.head(POINT_KEY)]


def save_trial(output: Store, trial: Trial) -> None:
    """Write what a trial gave; the first record stays."""
    store = trial_store(output, trial.point)
    if store.head(RECORD_KEY) is None:
        store.create(RECORD_KEY, encode_json(asdict(trial)))


def load_trial(output: Store, point: Point) -> Trial | None:
    """The record of the trial at a point, or None where it is not over."""
    store = trial_store(output, point)
    if store.head(RECORD_KEY) is None:
        return None
    record = read_json(store, RECORD_KEY)
    try:
        return Trial(**{**record, "history": tuple(record["history"])})
    except (KeyError, TypeError) as error:
        raise StorageError(f"{store.uri}/{RECORD_KEY} is no record of a trial: {error}") from error


def rank(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Best first: whole trials before those that were stopped, failed ones last."""

    def order(trial: Trial) -> tuple[bool, float]:
        score = trial.score(metric)
        return trial.status != "done", math.inf if score is None else -score

    return sorted(trials, key=order)


def trials_table(trials: Sequence[Trial], space: Space) -> pa.Table:
    """One row a trial: its place in the space, column by column, and what it gave."""
    rows = []
    for trial in trials:
        rows.append(
            {"trial": trial.name, "status": trial.status}
            | {name: _text(trial.point.get(name)) for name in space}
            | {name: trial.value(name) for name in ("val_accuracy", "val_loss", "train_loss")}
            | {
                "epochs": len(trial.history),
                "seconds": round(trial.seconds, 1),
                "parameters": trial.parameters,
                "error": trial.error,
            }
        )
    fields = [
        *((name, pa.string()) for name in ("trial", "status", *space)),
        *((name, pa.float64()) for name in ("val_accuracy", "val_loss", "train_loss")),
        *[("epochs", pa.int64()), ("seconds", pa.float64())],
        *[("parameters", pa.int64()), ("error", pa.string())],
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def _text(value: Any) -> str | None:
    """A value as text, since those of one setting may be of several types; None: as given."""
    return value if value is None or isinstance(value, str) else json.dumps(value)
