"""A run in MLflow: https://mlflow.org/docs/latest/ml/tracking/."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cnnray.errors import SettingsError, hide_credentials
from cnnray.models.bundle import DOCUMENT_KEY, WEIGHTS_KEY
from cnnray.storage import LocalStore, encode_json, open_store
from cnnray.training.trackers import (
    CURVES,
    Epoch,
    curves_of,
    numbers_of,
    require_package,
    root_reason,
)

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
            for name, value in curves_of(epoch).items()
        )
        self.steps = steps | missing.keys()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Numbers become metrics ``result/NAME``; the diagnosis and the bundle are artifacts."""
        self._write_metrics(
            (result["steps"], f"result/{name}", value) for name, value in numbers_of(result).items()
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
    require_package("mlflow", extra="mlflow")
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
