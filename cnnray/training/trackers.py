"""The two kinds of trackers: a run in MLflow, and event files for TensorBoard.

Both know by themselves which epochs they have, so histories can be written to them again and again,
and by a later process, and each epoch is there once. What they raise is not named in general.

https://mlflow.org/docs/latest/ml/tracking/, https://github.com/lanpa/tensorboardX
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cnnray.errors import SettingsError, hide_credentials
from cnnray.models.bundle import DOCUMENT_KEY, WEIGHTS_KEY
from cnnray.storage import LocalStore, encode_json, open_store
from cnnray.storage.replies import reason

CURVES = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "samples_per_second",
    "data_wait_fraction",
)
"""What is tracked of an epoch, at its optimizer step. The last one is never None."""

MAX_PARAMETER_LENGTH = 6000
"""Characters of a parameter's value in MLflow."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # it could ask for an hour
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the credentials that are in it
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""For MLflow's client, unless the user sets it; of its own accord it tries for many minutes."""

Epoch = Mapping[str, Any]
"""``EpochResult.to_dict()``."""


class Tracker(Protocol):
    """One place where curves go. Its methods may take their time, and raise anything."""

    @property
    def name(self) -> str:
        """What it is and where, for people."""

    def write_epochs(self, history: Sequence[Epoch]) -> None:
        """Write those epochs that are not there yet."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the train job's result, and close. Comes after the epochs."""

    def fail(self) -> None:
        """Close: the run did not get to its end."""


# MLflow


class MlflowTracker:
    """A run in MLflow."""

    def __init__(self, client: Any, run: Any, *, name: str) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self.parameters: Mapping[str, str] = run.data.params
        self.name = name
        self.steps: set[int] | None = None  # of the epochs that it has; None: to be asked for

    def write_parameters(self, parameters: Mapping[str, str]) -> None:
        """Write those that are new: MLflow lets no value be changed."""
        from mlflow.entities import Param

        new = [
            Param(name, value[:MAX_PARAMETER_LENGTH])
            for name, value in parameters.items()
            if name not in self.parameters
        ]
        self.client.log_batch(self.run_id, params=new)  # which it sends by the hundred

    def write_epochs(self, history: Sequence[Epoch]) -> None:
        """Write those epochs that are not there yet, in one request."""
        if self.steps is None:
            points = self.client.get_metric_history(self.run_id, CURVES[-1])
            self.steps = {point.step for point in points}
        steps, self.steps = self.steps, None  # a request that fails may have been carried out
        missing = {epoch["step"]: epoch for epoch in history if epoch["step"] not in steps}
        self._write_metrics(
            (step, name, value)
            for step, epoch in missing.items()
            for name, value in _curves(epoch).items()
        )
        self.steps = steps | missing.keys()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Numbers become metrics ``result/NAME``; the diagnosis and the bundle are artifacts."""
        self._write_metrics(
            (result["steps"], f"result/{name}", value) for name, value in _numbers(result).items()
        )
        self.client.set_tag(self.run_id, "cnnray.bundle", result["bundle"])
        self.client.set_tag(self.run_id, "cnnray.model", result["model"])
        try:
            self._write_artifacts(result)
        finally:
            self.client.set_terminated(self.run_id, "FINISHED")

    def fail(self) -> None:
        """The run has failed, until it goes on."""
        self.client.set_terminated(self.run_id, "FAILED")

    def _write_metrics(self, points: Iterable[tuple[int, str, float]]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, step) for step, name, value in points]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _write_artifacts(self, result: Mapping[str, Any]) -> None:
        diagnosis = encode_json(result["diagnosis"]).decode()
        self.client.log_text(self.run_id, diagnosis, "diagnosis.json")
        bundle = open_store(result["bundle"])
        document = bundle.read(DOCUMENT_KEY).decode()
        self.client.log_text(self.run_id, document, f"bundle/{DOCUMENT_KEY}")
        if isinstance(bundle, LocalStore):  # weights in a bucket can be had from there
            self.client.log_artifact(self.run_id, f"{bundle.root}/{WEIGHTS_KEY}", "bundle")


def check_mlflow(uri: str, experiment: str) -> None:
    """Raise ``SettingsError`` unless the package is there and MLflow answers, within seconds."""
    _require("mlflow", extra="mlflow")
    with _named_errors(uri):
        _client(uri).get_experiment_by_name(experiment)


def open_mlflow(
    uri: str,
    run_id: str | None,
    *,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, str],
) -> MlflowTracker:
    """The run ``run_id`` if MLflow has it, else a new one. Raises ``SettingsError``."""
    with _named_errors(uri):
        client = _client(uri)
        run = None if run_id is None else _find_run(client, run_id)
        if run is None:
            run = client.create_run(_experiment_id(client, experiment), run_name=run_name)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
        tracker = MlflowTracker(client, run, name=f"MLflow at {hide_credentials(uri)}")
        tracker.write_parameters(parameters)
    return tracker


def _client(uri: str) -> Any:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # retries are no news
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _find_run(client: Any, run_id: str) -> Any:
    """The run, or None when it is not there, or was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _experiment_id(client: Any, name: str) -> str:
    """The experiment's, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run has just made it
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


@contextlib.contextmanager
def _named_errors(uri: str) -> Iterator[None]:
    """Raise what MLflow, its connection or its database raises in one line."""
    try:
        yield
    except Exception as error:
        raise SettingsError(
            f"cannot use MLflow at {hide_credentials(uri)}: {root_reason(error)}",
            hint="--tracking.mlflow takes the address of an MLflow server, such as"
            " http://127.0.0.1:5000; for sqlite:///FILE install the package mlflow",
        ) from error


# TensorBoard


class TensorBoardTracker:
    """Event files in a folder; each hides what older ones have from its first step on.

    Writers for general use hand events to a thread that can fail unseen; this is the file below.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"TensorBoard in {folder}"
        self.file: Any = None
        self.steps: set[int] = set()  # of the epochs that this process has written

    def write_parameters(self, parameters: Mapping[str, str]) -> None:
        """Write them as a text at step 0."""
        self._begin_file(0)
        self._write(0, _text("settings", parameters))
        self.file.flush()

    def write_epochs(self, history: Sequence[Epoch]) -> None:
        """Write those epochs that are not there yet, and once more what comes after them."""
        epochs = {epoch["step"]: _curves(epoch) for epoch in history}
        missing = epochs.keys() - self.steps
        if not missing:
            return
        first = min(missing)
        if self.file is None or first < max(self.steps, default=0):
            self._begin_file(first)
        try:
            for step, curves in epochs.items():
                if step >= first:
                    self._write(step, _scalars(curves))
            self.file.flush()
        except OSError:
            self.file = None  # the next try begins another one, which hides this one's part
            raise
        self.steps |= missing

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result's numbers and the diagnosis become texts at the last step."""
        step = result["steps"]
        numbers = {name: f"{value:g}" for name, value in _numbers(result).items()}
        findings = {
            finding["name"]: f"{finding['text']} Try: {'; '.join(finding['advice'])}"
            for finding in result["diagnosis"]
        }
        self._write(step, _text("result", numbers | {"bundle": result["bundle"]}))
        self._write(step, _text("diagnosis", findings or {"healthy": "nothing was found"}))
        self._close()

    def fail(self) -> None:
        """Nothing but to close."""
        self._close()

    def _begin_file(self, first: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._close()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers go by the names: seconds, host, and what is added here.
        self.file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self.file.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.file.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()


def check_tensorboard() -> None:
    """Raise ``SettingsError`` unless the package is there."""
    _require("tensorboardX", extra="tensorboard")


def open_tensorboard(folder: Path, parameters: Mapping[str, str]) -> TensorBoardTracker:
    """Event files in ``folder``, where there may be older ones. Raises ``SettingsError``."""
    tracker = TensorBoardTracker(folder)
    if not folder.exists():
        try:
            tracker.write_parameters(parameters)
        except OSError as error:
            raise SettingsError(f"cannot write events to {folder}: {error.strerror}") from error
    return tracker


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(
        value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    )


def _text(tag: str, rows: Mapping[str, str]) -> Any:
    """A Markdown table of two columns."""
    from tensorboardX.summary import text

    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return text(tag, "\n".join(["| | |", "|---|---|", *lines]))


# Both


def root_reason(error: BaseException) -> str:
    """What the network or the disk says, where that is behind an error, else the error's text."""
    root = error
    while (behind := root.__cause__ or root.__context__) is not None:
        root = behind
    return reason(root if isinstance(root, OSError) else error)


def _curves(epoch: Epoch) -> dict[str, float]:
    return {name: epoch[name] for name in CURVES if epoch[name] is not None}


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def _require(package: str, *, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SettingsError(
            f"--tracking.{extra} needs the package {package}",
            hint=f"pip install 'cnnray[{extra}]'",
        )
