"""A run in MLflow and TensorBoard, read back as its users do; servers that come and go."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnnray.config import TrainSettings, load_settings
from cnnray.errors import NonFiniteLossError, SettingsError
from cnnray.storage import Store, open_store
from cnnray.training import tracking as tracking_module
from cnnray.training.loop import EpochResult
from cnnray.training.mlflow_tracker import MLFLOW_ENVIRONMENT
from cnnray.training.trackers import CURVES
from cnnray.training.tracking import TRACKING_KEY, Tracking, check_tracking, open_tracking

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
STEPS = 50
"""Of an epoch."""

Open = Callable[..., Tracking]


def result(epoch: int) -> EpochResult:
    """Curves in which each number says where it belongs."""
    return EpochResult(
        epoch=epoch,
        step=STEPS * (epoch + 1),
        train_loss=1 / (epoch + 1),
        train_accuracy=0.5 + epoch / 100,
        val_loss=2 / (epoch + 1),
        val_accuracy=0.4 + epoch / 100,
        learning_rate=0.001,
        samples_per_second=1000.0 + epoch,
        data_wait_fraction=0.25,
        seconds=3.0,
    )


def history(epochs: int) -> list[dict[str, Any]]:
    return [result(epoch).to_dict() for epoch in range(epochs)]


def steps(*epochs: int) -> list[int]:
    return [STEPS * (epoch + 1) for epoch in epochs]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two files where a bundle would be."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text('{"classes": ["cat", "dog"]}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def job_result(bundle: Path) -> dict[str, Any]:
    """What the train job says at its end, with something wrong."""
    advice = ["--augment.flip 0.5", "--epochs 2"]
    finding = {"name": "overfitting", "evidence": {"gap": 0.1}, "text": "Overfitting: …"}
    return {
        "bundle": str(bundle),
        "model": "0123abcd",
        "epochs": 3,
        "best_epoch": 2,
        "steps": STEPS * 3,
        "val_loss": 0.75,
        "val_accuracy": None,
        "diagnosis": [{**finding, "advice": advice}],
        "seconds": 12.5,
    }


# Servers


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """MLflow's server as a process, with all it keeps in a folder; killed at the end."""
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_FILE_STORE": "true",  # a database needs the whole package
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "_MLFLOW_SERVER_FILE_STORE": str(folder / "runs"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port"]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, str(port)], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "MLflow's server does not start"
            time.sleep(0.2)
        yield
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait(timeout=10)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """The folder of a run."""
    return open_store(str(tmp_path / "model/training/main"))


@pytest.fixture
def open_run(run: Store, tmp_path: Path) -> Open:
    """Opens the same run each time, as the driver does."""

    def open_(**changes: Any) -> Tracking:
        values: dict[str, Any] = {
            "name": "model-main",
            "parameters": {"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1}, "order_log": None},
            "mlflow": None,
            "experiment": tmp_path.name,
            "tensorboard": None,
        }
        return open_tracking(run, **{**values, **changes})

    return open_


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What trackers leave there is not there before, nor after."""
    for name in MLFLOW_ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    """Requests to a server that is silent are given up after a second."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def wait(tracking: Tracking) -> None:
    """Until what an epoch has begun is done."""
    assert tracking.writing is not None
    tracking.writing.result(timeout=30)


def write(tracking: Tracking, *epochs: int) -> None:
    for epoch in epochs:
        tracking.epoch(result(epoch))
        wait(tracking)


def client(uri: str) -> Any:
    """MLflow's own, imported only when the tests' environment is set."""
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return [] if found is None else list(client(uri).search_runs([found.experiment_id]))


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    found = client(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in found)


def artifact(uri: str, run_id: str, path: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return Path(client(uri).download_artifacts(run_id, path, str(folder))).read_text()


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of the one run in a folder."""
    [found] = folder.iterdir()
    accumulator = EventAccumulator(str(found))
    accumulator.Reload()
    return accumulator


def shown(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def text(folder: Path, name: str) -> list[str]:
    found = events(folder).Tensors(f"{name}/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in found]


# MLflow


def test_mlflow_has_the_settings_the_curves_the_result_and_the_bundle(
    served: str, open_run: Open, job_result: dict[str, Any], tmp_path: Path
) -> None:
    with open_run(mlflow=served) as tracking:
        write(tracking, 0, 1, 2)
        tracking.finish(job_result, history=history(3))
    [found] = runs_of(served, tmp_path.name)
    assert found.info.status == "FINISHED"
    assert found.info.run_name.startswith("model-main-")
    assert found.data.params == {
        "epochs": "3",
        "optimizer.name": "sgd",
        "optimizer.lr": "0.1",
        "order_log": "None",
    }
    for name in CURVES:
        expected = [(epoch["step"], epoch[name]) for epoch in history(3)]
        assert points(served, found.info.run_id, name) == expected
    numbers = {name: value for name, value in found.data.metrics.items() if "result/" in name}
    assert numbers == {
        "result/epochs": 3,
        "result/best_epoch": 2,
        "result/steps": STEPS * 3,
        "result/val_loss": 0.75,
        "result/seconds": 12.5,
    }
    assert found.data.tags["cnnray.bundle"] == job_result["bundle"]
    assert found.data.tags["cnnray.model"] == "0123abcd"
    for path, said in (
        ("diagnosis.json", "overfitting"),
        ("bundle/model.json", '{"classes": ["cat", "dog"]}'),
        ("bundle/model.safetensors", "weights"),
    ):
        assert said in artifact(served, found.info.run_id, path, tmp_path / "down")


def test_a_run_that_goes_on_is_the_same_in_mlflow_with_each_epoch_once(
    served: str, open_run: Open, job_result: dict[str, Any], tmp_path: Path
) -> None:
    with contextlib.suppress(NonFiniteLossError), open_run(mlflow=served) as tracking:
        write(tracking, 0, 1)
        raise NonFiniteLossError("a loss that is not finite")
    [first] = runs_of(served, tmp_path.name)
    assert first.info.status == "FAILED"
    parameters = {"epochs": 9, "seed": 7}  # one that may change, and one of a newer version
    with open_run(mlflow=served, parameters=parameters) as tracking:
        [going] = runs_of(served, tmp_path.name)
        assert going.info.status == "RUNNING"
        write(tracking, 1, 3)  # 1 once more; 2 was trained, but never told of
        tracking.finish(job_result, history=history(4))
    [last] = runs_of(served, tmp_path.name)
    assert (last.info.run_id, last.info.status) == (first.info.run_id, "FINISHED")
    assert last.data.params == {**first.data.params, "seed": "7"}
    for name in CURVES:
        assert [step for step, _ in points(served, last.info.run_id, name)] == steps(0, 1, 2, 3)


def test_a_run_that_was_deleted_in_mlflow_is_made_anew(
    served: str, open_run: Open, tmp_path: Path
) -> None:
    with open_run(mlflow=served) as tracking:
        write(tracking, 0)
    [first] = runs_of(served, tmp_path.name)
    client(served).delete_run(first.info.run_id)
    with open_run(mlflow=served) as tracking:
        write(tracking, 0)
    [second] = runs_of(served, tmp_path.name)
    assert second.info.run_id != first.info.run_id
    assert [step for step, _ in points(served, second.info.run_id, "train_loss")] == steps(0)


def test_many_parameters_and_long_ones_fit(served: str, open_run: Open, tmp_path: Path) -> None:
    many = {f"number_{n:03d}": n for n in range(250)}
    with open_run(mlflow=served, parameters={"section": many, "long": "x" * 7000}):
        [found] = runs_of(served, tmp_path.name)
    assert len(found.data.params) == 251
    assert found.data.params["section.number_249"] == "249"
    assert found.data.params["long"] == "x" * 6000


def test_an_experiment_that_another_run_makes_meanwhile_is_shared(
    served: str, open_run: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    class Late(mlflow.MlflowClient):
        """Sees nothing the first time; then it is there."""

        looked = 0

        def get_experiment_by_name(self, name: str) -> Any:
            self.looked += 1
            if self.looked == 1:
                return self.create_experiment(name) and None
            return super().get_experiment_by_name(name)

    monkeypatch.setattr(mlflow, "MlflowClient", Late)
    with open_run(mlflow=served):
        monkeypatch.undo()
        assert len(runs_of(served, tmp_path.name)) == 1


def test_a_server_that_dies_is_warned_of_once_and_gets_all_when_it_is_back(
    open_run: Open, job_result: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder, port = tmp_path / "server", free_port()
    folder.mkdir()
    uri = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as first:
        first.enter_context(mlflow_server(folder, port))
        with open_run(mlflow=uri) as tracking:
            write(tracking, 0)
            first.close()
            write(tracking, 1, 2)
            warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            assert warnings == [
                f"MLflow at {uri}, it is tried again: [Errno 111] Connection refused"
            ]
            with mlflow_server(folder, port):
                write(tracking, 3)
                [found] = runs_of(uri, tmp_path.name)
                assert [step for step, _ in points(uri, found.info.run_id, "val_loss")] == steps(
                    0, 1, 2, 3
                )
                tracking.finish(job_result, history=history(4))
                [found] = runs_of(uri, tmp_path.name)
                assert found.info.status == "FINISHED"
                assert len(points(uri, found.info.run_id, "val_loss")) == 4


def test_a_server_that_is_gone_at_the_end_is_a_warning(
    open_run: Open, job_result: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "server").mkdir()
    port = free_port()
    with contextlib.ExitStack() as server:
        server.enter_context(mlflow_server(tmp_path / "server", port))
        with open_run(mlflow=f"http://127.0.0.1:{port}") as tracking:
            server.close()
            started = time.monotonic()
            tracking.finish(job_result, history=history(3))
            assert time.monotonic() - started < 20
    assert "it stays incomplete: [Errno 111] Connection refused" in caplog.text


def test_an_epoch_does_not_wait_for_a_server_that_is_silent(
    served: str, open_run: Open, impatient: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, open_run(mlflow=served) as tracking:
        [tracker] = tracking.trackers
        tracker.client = client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        for epoch in range(100):
            tracking.epoch(result(epoch))
        assert time.monotonic() - started < 1
        wait(tracking)  # one try for all of them


# Before training


def test_mlflow_without_an_answer_is_refused_within_seconds(impatient: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, said in (
            (free_port(), "[Errno 111] Connection refused"),
            (silent.getsockname()[1], "timed out"),
        ):
            started = time.monotonic()
            with pytest.raises(SettingsError) as caught:
                check_tracking(f"http://me:secret@127.0.0.1:{port}", "cnnray", None)
            assert time.monotonic() - started < 15
            message, hint = str(caught.value).splitlines()
            assert message.startswith(f"cannot use MLflow at http://127.0.0.1:{port}: ")
            assert said in message
            assert hint.startswith("hint: --tracking.mlflow takes the address of an MLflow server")
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["runs", "gopher://somewhere"])
def test_addresses_that_the_light_package_cannot_use_are_a_line_and_a_hint(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"^cannot use MLflow at {uri}: ") as caught:
        check_tracking(uri, "cnnray", None)
    assert len(str(caught.value).splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "extra"), [("mlflow", "mlflow"), ("tensorboardX", "tensorboard")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted)
    )
    settings: dict[str, Any] = {"mlflow": None, "experiment": "cnnray", "tensorboard": None}
    with pytest.raises(SettingsError) as caught:
        check_tracking(**{**settings, extra: "http://127.0.0.1:1"})
    assert str(caught.value).splitlines() == [
        f"--tracking.{extra} needs the package {package}",
        f"hint: pip install 'cnnray[{extra}]'",
    ]


def test_a_folder_for_tensorboard_that_is_a_file_is_named(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "curves").touch()
    with pytest.raises(SettingsError, match="cannot write events to .*: Not a directory"):
        open_run(tensorboard=str(tmp_path / "curves"))


def test_nothing_is_loaded_or_written_without_a_tracker(run: Store) -> None:
    code = (
        "import sys\n"
        "from cnnray.storage import open_store\n"
        "from cnnray.training.tracking import check_tracking, open_tracking\n"
        "off = {'mlflow': None, 'experiment': 'x', 'tensorboard': None}\n"
        "check_tracking(**off)\n"
        f"run = open_store({run.uri!r})\n"
        "with open_tracking(run, name='x', parameters={}, **off) as tracking:\n"
        "    tracking.finish({}, history=[])\n"
        "print({'mlflow', 'tensorboardX', 'tensorboard'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "set()\n", done.stderr
    assert not Path(run.uri).exists()


# TensorBoard


def test_tensorboard_shows_the_settings_the_curves_and_the_result(
    open_run: Open, job_result: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "curves"
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 0)
        assert shown(folder, "train_loss") == [(50, 1.0)], "it is there while training goes on"
        write(tracking, 1, 2)
        tracking.finish(job_result, history=history(3))
    assert sorted(events(folder).Tags()["scalars"]) == sorted(CURVES)
    for name in CURVES:
        expected = [(epoch["step"], epoch[name]) for epoch in history(3)]
        assert shown(folder, name) == [(step, pytest.approx(value)) for step, value in expected]
    assert "| optimizer.lr | 0.1 |" in text(folder, "settings")[0]
    assert "| val_loss | 0.75 |" in text(folder, "result")[0]
    assert "Overfitting: … Try: --augment.flip 0.5; --epochs 2" in text(folder, "diagnosis")[0]


def test_a_run_that_goes_on_is_shown_by_tensorboard_with_each_epoch_once(
    open_run: Open, job_result: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "curves"
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 0, 1)
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 1, 3)  # 1 once more; 2 was trained, but never told of
        assert [step for step, _ in shown(folder, "val_loss")] == steps(0, 1, 3)
        tracking.finish(job_result, history=history(4))
    for name in CURVES:
        assert [step for step, _ in shown(folder, name)] == steps(0, 1, 2, 3)
    assert len(text(folder, "settings")) == len(text(folder, "diagnosis")) == 1


def test_runs_in_one_folder_are_apart(open_run: Open, run: Store, tmp_path: Path) -> None:
    folder = tmp_path / "curves"
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 0, 1)
    run.delete(TRACKING_KEY)  # as --overwrite does
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 0)
    counts = []
    for each in folder.iterdir():
        accumulator = EventAccumulator(str(each))
        accumulator.Reload()
        counts.append(len(accumulator.Scalars("train_loss")))
    assert sorted(counts) == [1, 2]


def test_a_disk_that_is_full_is_warned_of_and_written_to_again(
    open_run: Open, job_result: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "curves"
    with open_run(tensorboard=str(folder)) as tracking:
        write(tracking, 0)
        [tracker] = tracking.trackers
        with open("/dev/full", "wb", buffering=0) as full:
            tracker.file._py_recordio_writer._writer = full
            write(tracking, 1)
        assert "it is tried again: [Errno 28] No space left on device" in caplog.text
        write(tracking, 2)
        tracking.finish(job_result, history=history(3))
    assert [step for step, _ in shown(folder, "train_loss")] == steps(0, 1, 2)


def test_a_tracker_that_fails_does_not_keep_another_from_its_epochs(
    served: str, open_run: Open, job_result: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "curves"
    with open_run(mlflow=served, tensorboard=str(folder)) as tracking:
        _, mlflow = tracking.trackers
        mlflow.client = client(f"http://127.0.0.1:{free_port()}")
        write(tracking, 0)
        tracking.finish(job_result, history=history(1))
    assert shown(folder, "train_loss") == [(50, 1.0)]


def test_the_end_does_not_wait_for_ever(
    open_run: Open,
    job_result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking_module, "END_SECONDS", 0.2)
    released = threading.Event()

    class Stuck:
        name = "a tracker"

        def write_epochs(self, history: Any) -> None:
            released.wait(timeout=30)

    with Tracking([Stuck()]) as tracking:
        tracking.finish(job_result, history=history(1))
        released.set()
    assert "tracking is given up" in caplog.text


# Settings


def test_credentials_of_an_address_are_in_no_document_and_no_parameter() -> None:
    flags = ["--data", "d", "--output", "o", "--tracking.mlflow", "https://me:se@cret@host/path"]
    settings = load_settings(TrainSettings, flags)
    assert settings.tracking.mlflow == "https://me:se@cret@host/path"
    assert settings.model_dump(mode="json")["tracking"]["mlflow"] == "https://host/path"
    for said in (settings.model_dump_json(), repr(settings), str(settings)):
        assert "cret" not in said


def test_the_name_and_the_id_are_all_that_is_remembered(
    served: str, open_run: Open, run: Store
) -> None:
    with open_run(mlflow=served.replace("//", "//me:secret@")):
        pass
    assert b"secret" not in run.read(TRACKING_KEY)
    assert set(json.loads(run.read(TRACKING_KEY))) == {"name", "mlflow_run_id"}


@pytest.mark.parametrize("folder", ["s3://bucket/curves", "gs://bucket/curves"])
def test_a_bucket_for_tensorboard_is_refused(folder: str) -> None:
    flags = ["--data", "d", "--output", "o", "--tracking.tensorboard", folder]
    with pytest.raises(SettingsError) as caught:
        load_settings(TrainSettings, flags)
    assert str(caught.value).splitlines()[0] == (
        f"--tracking.tensorboard: events are written to a local folder, got '{folder}'"
    )
