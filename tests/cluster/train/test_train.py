"""Training for real: what is learnt, resumed, shared among workers, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cnnray.cluster.train.plan as plan_module
from cnnray.cluster.pack.job import pack
from cnnray.cluster.train.job import train
from cnnray.errors import (
    CnnrayError,
    ConflictError,
    DataError,
    ModelError,
    NonFiniteLossError,
    SettingsError,
    UsageError,
)
from cnnray.models.bundle import load_bundle
from cnnray.storage import open_store
from cnnray.training.network import Network

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [epoch[name] for epoch in history for name in ("train_loss", "val_loss")]


def test_one_worker_learns_the_colours_and_leaves_a_bundle_and_its_checkpoints(trained):
    assert trained.result["val_accuracy"] == 1.0
    assert trained.result["epochs"] == 3
    assert trained.history[-1]["train_loss"] < 0.5 * trained.history[0]["train_loss"]
    bundle = load_bundle(open_store(str(trained.folder)))
    assert bundle.spec.classes == ("blue", "green", "red")
    assert bundle.digest == trained.result["model"]
    assert bundle.spec.preprocessing.size == 12
    epochs = sorted(path.name for path in (trained.folder / "training/main").glob("epoch-*"))
    assert epochs[-1] == "epoch-00002"
    assert len(epochs) <= 3


def test_the_order_log_has_every_key_once_an_epoch_and_another_order_in_the_next(trained, dataset):
    import pyarrow.parquet as pq

    keys = pq.read_table(dataset / "train", columns=["key"])["key"].to_pylist()
    epochs = [trained.batches(epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(key for batch in batches for key in batch) == sorted(keys)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_split_that_is_decoded_once_trains_as_one_that_is_read_every_epoch(run_training, trained):
    streamed = run_training(ingest={"decoded_bytes": 0})
    assert losses(streamed.history) == losses(trained.history)
    assert [streamed.batches(epoch) for epoch in range(3)] == [
        trained.batches(epoch) for epoch in range(3)
    ]


def test_balanced_and_repeated_images_train_alike_read_or_decoded(
    pack_settings, run_training, painter, tmp_path
):
    import pyarrow.parquet as pq

    painter.photos(tmp_path / "photos", 90)
    for path in sorted((tmp_path / "photos/red").iterdir())[9:]:
        path.unlink()  # a tenth of the others'
    data = tmp_path / "packed"
    pack(pack_settings(input=str(tmp_path / "photos"), output=str(data)))
    keys = pq.read_table(data / "train", columns=["key"])["key"].to_pylist()
    settings = {
        "data": str(data),
        "epochs": 2,
        "imbalance": {"method": "balanced_sampler"},
        "augment": {"flip": 0.5, "repeats": 3},
    }
    decoded = run_training(**settings)
    streamed = run_training(**settings, ingest={"decoded_bytes": 0})
    assert losses(streamed.history) == losses(decoded.history)
    for epoch in range(2):
        log = pq.read_table(decoded.order_log / f"epoch-{epoch:05d}")
        assert decoded.result["steps"] == 2 * len(log["step"].unique())
        taken = log["key"].to_pylist()
        counts = Counter(key.split("/")[0] for key in taken)
        assert len(taken) == len(keys)  # whatever the repeats
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_finished_run_is_not_overwritten_unasked(run_training, trained):
    before = (trained.folder / "model.json").read_bytes()
    with pytest.raises(UsageError, match="holds a bundle already"):
        run_training(output=str(trained.folder))
    assert (trained.folder / "model.json").read_bytes() == before


def test_a_run_that_stopped_goes_on_where_it_was_and_ends_as_if_it_had_not(run_training, trained):
    first = run_training(epochs=1)
    for name in ("model.json", "model.safetensors"):  # stopped before the bundle was written
        (first.folder / name).unlink()
    resumed = run_training(output=str(first.folder), epochs=3)
    assert not (resumed.order_log / "epoch-00000").exists(), "the first epoch was repeated"
    assert losses(resumed.history) == pytest.approx(losses(trained.history), abs=1e-6)
    assert resumed.batches(2) == trained.batches(2)


def test_mlflow_and_tensorboard_have_the_epochs_of_a_run_that_stopped_and_went_on(
    run_training, monkeypatch, tmp_path
):
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs the whole package
    uri, curves = str(tmp_path / "runs"), tmp_path / "curves"
    tracking = {"mlflow": uri, "tensorboard": str(curves)}
    first = run_training(epochs=1, tracking=tracking)
    for name in ("model.json", "model.safetensors"):  # stopped before the bundle was written
        (first.folder / name).unlink()
    resumed = run_training(output=str(first.folder), epochs=3, tracking=tracking)
    expected = [(epoch["step"], epoch["val_loss"]) for epoch in resumed.history]
    [tracked] = MlflowClient(uri).search_runs(
        [MlflowClient(uri).get_experiment_by_name("cnnray").experiment_id]
    )
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["optimizer.name"] == "sgd"
    assert tracked.data.tags["cnnray.model"] == resumed.result["model"]
    points = MlflowClient(uri).get_metric_history(tracked.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in points] == expected
    [folder] = curves.iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss in expected]


def test_other_settings_do_not_continue_a_run(run_training, trained, tmp_path):
    shutil.copytree(trained.folder / "training", tmp_path / "training")
    with pytest.raises(ConflictError, match="other settings: optimizer, seed"):
        run_training(output=str(tmp_path), seed=8, optimizer={"name": "adam"})


def test_a_run_from_before_a_setting_was_there_is_continued_with_its_default(
    run_training, trained, tmp_path
):
    shutil.copytree(trained.folder / "training", tmp_path / "training")
    path = tmp_path / "training/main/settings.json"
    older = json.loads(path.read_text())
    del older["compute"], older["mix"], older["model"]["drop_path"]
    path.write_text(json.dumps(older))
    with pytest.raises(ConflictError, match="other settings: compute, mix\n"):
        run_training(output=str(tmp_path), compute={"precision": "bf16"}, mix={"probability": 0.5})
    run = run_training(output=str(tmp_path))
    assert losses(run.history) == losses(trained.history)


def test_two_workers_with_a_shard_each_take_the_same_steps_and_one_goes_on_from_them(
    run_training, trained
):
    shards = {
        "compute": {"strategy": "fsdp"},
        "scaling": {"num_workers": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"every_steps": 4},
    }
    first = run_training(epochs=1, **shards)
    assert first.batches(0) == trained.batches(0)
    assert losses(first.history) == pytest.approx(losses(trained.history[:1]), abs=1e-4)
    for name in ("model.json", "model.safetensors"):  # stopped before the bundle was written
        (first.folder / name).unlink()
    resumed = run_training(output=str(first.folder), epochs=3)
    assert losses(resumed.history) == pytest.approx(losses(trained.history), abs=1e-4)


def test_three_workers_take_the_same_global_batches_to_the_same_losses(run_training, trained):
    run = run_training(epochs=1, scaling={"num_workers": 3, "cpus_per_worker": 0.3})
    assert run.batches(0) == trained.batches(0)
    assert {path.name for path in (run.order_log / "epoch-00000").iterdir()} == {
        f"step-00000000-rank-0000{rank}.parquet" for rank in range(3)
    }
    assert losses(run.history) == pytest.approx(losses(trained.history[:1]), abs=1e-4)


def network_that_dies(
    folder: Path, *, rank: int, at: int, after: Path | None = None
) -> type[Network]:
    """Its worker is killed once, before its ``at``-th pass in training, when ``after`` is there.

    Each pass of the rank adds a byte to ``folder``/passes.
    """
    dead, passes = folder / "dead", folder / "passes"

    class MortalNetwork(Network):  # a local class travels to the workers by value
        def build(self, *, with_weights: bool = True) -> Any:
            classifier = super().build(with_weights=with_weights)
            steps = []

            def count(*_: Any) -> None:
                import ray.train

                if not classifier.training or ray.train.get_context().get_world_rank() != rank:
                    return
                steps.append(1)
                with passes.open("a") as file:
                    file.write("x")
                if len(steps) == at and not dead.exists():
                    deadline = time.monotonic() + 60
                    while after is not None and not after.exists() and time.monotonic() < deadline:
                        time.sleep(0.05)
                    dead.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            classifier.register_forward_pre_hook(count)
            return classifier

    return MortalNetwork


def test_two_workers_of_which_one_is_killed_go_on_from_the_checkpoint(
    run_training, trained, monkeypatch, tmp_path
):
    assert len(trained.batches(0)) < 12  # in the middle of the second epoch
    monkeypatch.setattr(plan_module, "Network", network_that_dies(tmp_path, rank=1, at=12))
    run = run_training(epochs=2, scaling={"num_workers": 2, "cpus_per_worker": 0.5})
    assert (tmp_path / "dead").exists()
    assert run.result["epochs"] == 2
    assert [run.batches(epoch) for epoch in range(2)] == [trained.batches(n) for n in range(2)]
    assert losses(run.history) == pytest.approx(losses(trained.history[:2]), abs=1e-3)


def dies_after_step_four(tmp_path: Path) -> type[Network]:
    """Before its sixth step, when the checkpoint after the fourth is whole."""
    checkpoint = "model/training/main/epoch-00000-step-00000004/MANIFEST.json"
    return network_that_dies(tmp_path, rank=0, at=6, after=tmp_path / checkpoint)


def test_a_worker_killed_inside_an_epoch_goes_on_at_the_step_of_its_checkpoint(
    run_training, trained, monkeypatch, tmp_path
):
    monkeypatch.setattr(plan_module, "Network", dies_after_step_four(tmp_path))
    run = run_training(epochs=1, output=str(tmp_path / "model"), checkpoint={"every_steps": 2})
    assert (tmp_path / "dead").exists()
    steps = len(trained.batches(0))
    assert (tmp_path / "passes").stat().st_size == 6 + steps - 4
    assert run.result["steps"] == steps
    assert run.batches(0) == trained.batches(0)
    assert losses(run.history) == pytest.approx(losses(trained.history[:1]), abs=1e-5)


def test_two_workers_go_on_at_the_step_where_one_was_killed(
    run_training, trained, monkeypatch, tmp_path
):
    places = {"output": str(tmp_path / "model"), "order_log": str(tmp_path / "order")}
    monkeypatch.setattr(plan_module, "Network", dies_after_step_four(tmp_path))
    with pytest.raises(CnnrayError):
        run_training(epochs=1, **places, checkpoint={"every_steps": 2, "max_restarts": 0})
    monkeypatch.undo()
    scaling = {"num_workers": 2, "cpus_per_worker": 0.5}
    run = run_training(epochs=1, **places, scaling=scaling)
    pieces = {path.name for path in (tmp_path / "order/epoch-00000").iterdir()}
    assert pieces == {
        f"step-0000000{step}-rank-0000{rank}.parquet"
        for step, rank in ((0, 0), (2, 0), (4, 0), (4, 1))
    }
    assert run.batches(0) == trained.batches(0)
    assert losses(run.history) == pytest.approx(losses(trained.history[:1]), abs=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_bundle(run_training, tmp_path):
    with pytest.raises(NonFiniteLossError, match="not finite at step") as caught:
        run_training(output=str(tmp_path / "model"), optimizer={"name": "sgd", "lr": 1e9})
    assert caught.value.exit_code == 6
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "model/model.json").exists()
    assert not (tmp_path / "model/model.safetensors").exists()


@pytest.mark.timeout(60)
def test_workers_that_do_not_fit_the_cluster_are_refused_at_once(run_training, trained):
    started = time.monotonic()
    for scaling, said in (
        ({"num_workers": 2, "cpus_per_worker": 1.0}, "need 3 CPUs, the cluster has 2"),
        ({"num_workers": 40}, "40 workers share batches of 32 images"),
        ({"use_gpu": True}, "1 workers need 1 GPUs"),
    ):
        with pytest.raises(SettingsError, match=said):
            run_training(scaling=scaling)
    assert time.monotonic() - started < 10


@pytest.mark.timeout(60)
def test_mistakes_are_found_before_a_worker_is_started(run_training, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for changes, error in (
        ({"data": str(tmp_path / "empty")}, DataError),
        ({"model": {"name": "resnet81"}}, ModelError),
        ({"model": {"name": "tutorial_cnn", "weights": str(tmp_path / "none")}}, UsageError),
        ({"image": {"progressive": 0.5}}, SettingsError),  # tutorial_cnn takes one size only
        ({"model": {"name": "resnet18"}, "optimizer": {"name": "muon"}}, SettingsError),
        ({"distill": {"teacher": str(tmp_path / "empty")}}, ModelError),
        ({"compute": {"precision": "fp16"}}, SettingsError),
    ):
        with pytest.raises(error):
            run_training(output=str(tmp_path / "model"), **changes)
    assert not (tmp_path / "model").exists()


def test_a_damaged_shard_ends_the_run_with_its_name(train_settings, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "dataset")
    [shard, *_] = sorted((tmp_path / "dataset/train").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    shard.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(DataError, match=f"{shard.name} is damaged") as caught:
        train(train_settings(data=str(tmp_path / "dataset"), output=str(tmp_path / "model")))
    assert time.monotonic() - started < 240
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "model/model.json").exists()


def test_weights_at_a_relative_path_are_fine_tuned_with_a_frozen_backbone(
    run_training, trained, monkeypatch
):
    monkeypatch.chdir(trained.folder)
    model = {"name": "tutorial_cnn", "weights": "model.safetensors", "freeze": "backbone"}
    run = run_training(epochs=1, model=model, image={"size": 12, "resize": 12})
    assert run.result["val_accuracy"] == 1.0
    before, after = (
        load_bundle(open_store(str(folder))).model.state_dict()
        for folder in (trained.folder, run.folder)
    )
    names = [name for name in before if name.startswith("backbone.")]
    moved = {name for name in names if not before[name].equal(after[name])}
    assert moved == {"backbone.head.weight", "backbone.head.bias"}


def test_two_workers_learn_from_a_teacher_of_another_size_and_from_no_other_after(
    run_training, trained, tmp_path
):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(trained.folder / name, teacher)
    settings = {
        "output": str(tmp_path / "model"),
        "image": {"size": 8},
        "mix": {"mixup_alpha": 0.2},
        "accumulate_steps": 2,
        "distill": {"teacher": str(teacher), "alpha": 0.9},
        "scaling": {"num_workers": 2, "cpus_per_worker": 0.5},
    }
    run = run_training(**settings)
    assert run.result["val_accuracy"] > 0.9
    bundle = load_bundle(open_store(str(run.folder)))
    assert bundle.spec.preprocessing.size == 8
    assert bundle.spec.provenance["teacher"] == {
        "uri": str(teacher),
        "model": trained.result["model"],
    }
    for name in ("model.json", "model.safetensors"):  # stopped before the bundle was written
        (run.folder / name).unlink()
    document = json.loads((teacher / "model.json").read_text())
    (teacher / "model.json").write_text(json.dumps(document | {"temperature": 2.0}))
    with pytest.raises(ConflictError, match="other settings: distill\n"):
        run_training(**settings)


@pytest.mark.timeout(60)
def test_a_teacher_is_not_overwritten_by_its_student(run_training, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "model")
    teacher = str(tmp_path / "model")
    with pytest.raises(SettingsError, match="the teacher is at --output"):
        run_training(output=teacher, overwrite=True, distill={"teacher": f"{teacher}/"})
    load_bundle(open_store(teacher))
