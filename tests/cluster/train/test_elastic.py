"""Nodes and workers come and go while training goes on, and each sample is taken once."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import cnnray.cluster.train.elastic.policy as policy_module
import cnnray.cluster.train.plan as plan_module
from cnnray.training.network import Network

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("ray_session"),
]

BEGUN = re.compile(r"(\d+) workers begin in epoch (\d+), after step (\d+)")


@pytest.fixture
def cluster(ray_session: None) -> Iterator[Any]:
    """The tests' Ray as a cluster that nodes may join and leave."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=False, shutdown_at_exit=False)  # else only in a main thread
    cluster.head_node = ray._private.worker._global_node
    cluster.redis_address = cluster.head_node.redis_address
    yield cluster
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


def network_that(act: Callable[[int], None]) -> type[Network]:
    """It acts before each of its passes in training, which its process counts from 1.

    From its second epoch on it looks after every step whether a checkpoint is requested.
    """

    class ActingNetwork(Network):  # a local class travels to the workers by value
        def build(self, *, with_weights: bool = True) -> Any:
            classifier = super().build(with_weights=with_weights)
            passes: list[int] = []

            def before(*_: Any) -> None:
                if classifier.training:
                    import cnnray.training.loop as loop

                    loop.LOOK_SECONDS = 0.0
                    passes.append(1)
                    act(len(passes))

            classifier.register_forward_pre_hook(before)
            return classifier

    return ActingNetwork


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def beginnings(caplog: pytest.LogCaptureFixture) -> list[tuple[int, int, int]]:
    """(workers, epoch from 1 on, steps of it that were done) of each group that was started."""
    found = (BEGUN.fullmatch(message) for message in caplog.messages)
    return [tuple(int(text) for text in match.groups()) for match in found if match]


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [epoch[name] for epoch in history for name in ("train_loss", "val_loss")]


def drain(node: Any, *, seconds: float) -> None:
    """What a cloud's notice becomes in Ray."""
    import ray
    from ray.core.generated import autoscaler_pb2

    gcs = ray._raylet.GcsClient(address=node.gcs_address)
    is_accepted, why_not = gcs.drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test takes it away",
        int(1000 * (time.time() + seconds)),
    )
    assert is_accepted, why_not


@pytest.mark.soak
def test_a_run_begins_with_the_one_worker_that_fits_and_goes_on_with_two_once_a_node_joins(
    cluster, run_training, trained, monkeypatch, caplog, tmp_path
):
    caplog.set_level(logging.INFO, logger="cnnray")
    monkeypatch.setattr(policy_module, "RESIZE_SECONDS", 2.0)

    begun, joined = tmp_path / "begun", tmp_path / "joined"

    def take_time_alone(number: int) -> None:
        import ray.train

        begun.touch()
        if ray.train.get_context().get_world_size() > 1:
            return
        deadline = time.monotonic() + 60
        while number == 2 and not joined.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(4.0)  # such steps are looked at one by one, or two

    def join() -> None:
        wait_until(begun.exists)
        cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
        joined.touch()

    monkeypatch.setattr(plan_module, "Network", network_that(take_time_alone))
    scaling = {"num_workers": "1:2", "cpus_per_worker": 1.0}
    with ThreadPoolExecutor(1) as helper:
        done = helper.submit(join)
        checkpoint = {"max_restarts": 0}  # a resize is none
        run = run_training(epochs=1, scaling=scaling, checkpoint=checkpoint)
        done.result(timeout=60)

    first, (workers, epoch, step) = beginnings(caplog)
    assert first == (1, 1, 0)
    assert (workers, epoch) == (2, 1)
    assert step > 0, "there was no checkpoint before the resize"
    assert run.batches(0) == trained.batches(0)
    assert losses(run.history) == pytest.approx(losses(trained.history[:1]), abs=1e-3)


def test_a_worker_killed_inside_an_epoch_is_replaced_and_no_sample_is_lost_or_taken_twice(
    run_training, trained, monkeypatch, caplog, tmp_path
):
    caplog.set_level(logging.INFO, logger="cnnray")
    dead = tmp_path / "dead"
    checkpoint = tmp_path / "model/training/main/epoch-00000-step-00000004/MANIFEST.json"

    def die(number: int) -> None:
        import ray.train

        if number == 6 and ray.train.get_context().get_world_rank() == 1 and not dead.exists():
            deadline = time.monotonic() + 60
            while not checkpoint.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(plan_module, "Network", network_that(die))
    run = run_training(
        epochs=1,
        output=str(tmp_path / "model"),
        scaling={"num_workers": "1:2", "cpus_per_worker": 0.5},
        checkpoint={"every_steps": 2, "max_restarts": 1},
    )
    assert dead.exists()
    assert beginnings(caplog) == [(2, 1, 0), (2, 1, 4)]
    assert run.batches(0) == trained.batches(0)
    assert losses(run.history) == pytest.approx(losses(trained.history[:1]), abs=1e-3)


@pytest.mark.soak
def test_a_node_that_gives_notice_has_a_checkpoint_written_from_which_another_goes_on(
    cluster, run_training, trained, monkeypatch, caplog, tmp_path
):
    caplog.set_level(logging.INFO, logger="cnnray")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    node = cluster.add_node(num_cpus=4, object_store_memory=100_000_000)  # room for the worker
    begun, gone = tmp_path / "begun", tmp_path / "gone"
    checkpoint = tmp_path / "model/training/main/epoch-00001-step-00000003/MANIFEST.json"

    def wait_for_notice_and_the_end(number: int) -> None:
        from cnnray.cluster.train.elastic.ray_internals import find_preempted_nodes

        deadline = time.monotonic() + 60
        while number == 10 and not gone.exists() and time.monotonic() < deadline:
            begun.touch()
            if find_preempted_nodes():
                return
            time.sleep(0.05)
        while number == 11 and not gone.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def take_away() -> None:
        wait_until(begun.exists)
        drain(node, seconds=600)
        wait_until(lambda: "is going away" in caplog.text)
        assert checkpoint.exists()
        cluster.remove_node(node)
        gone.touch()
        cluster.add_node(num_cpus=4, object_store_memory=100_000_000)

    monkeypatch.setattr(plan_module, "Network", network_that(wait_for_notice_and_the_end))
    with ThreadPoolExecutor(1) as helper:
        taken = helper.submit(take_away)
        run = run_training(
            epochs=2,
            output=str(tmp_path / "model"),
            scaling={"num_workers": "1:2", "cpus_per_worker": 3.0},
            checkpoint={"max_restarts": 1},  # it went before the deadline of its notice
        )
        taken.result(timeout=60)

    notices = [message for message in caplog.messages if "is going away" in message]
    assert len(notices) == 1
    assert notices[0].endswith("is going away: checkpoint written at step 10")
    assert beginnings(caplog) == [(1, 1, 0), (1, 2, 3)]
    for epoch in range(2):
        assert run.batches(epoch) == trained.batches(epoch)
    assert losses(run.history) == pytest.approx(losses(trained.history[:2]), abs=1e-5)
