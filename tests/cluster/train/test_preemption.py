"""Checkpoints out of turn on rank 0, and how the controller counts workers, waits and resizes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.preemption import PreemptionInfo

import cnnray.cluster.train.elastic.policy as policy_module
import cnnray.cluster.train.elastic.preemption as preemption
import cnnray.cluster.train.elastic.ray_internals as ray_internals
from cnnray.cluster.core.failures import find_cause
from cnnray.cluster.core.nodes import ClusterNode
from cnnray.cluster.core.resources import WorkerPlan
from cnnray.cluster.train.elastic.policy import ElasticRules, find_lack_of_workers, plan_scaling
from cnnray.cluster.train.elastic.preemption import PreemptionState
from cnnray.cluster.train.elastic.ray_internals import ElasticPolicy
from cnnray.config import ScalingSettings
from cnnray.errors import IncompleteError

ONE_CPU = WorkerPlan(num_workers=1, cpus=1.0, gpus=0.0, threads=1, reading_fraction=0.5)
WAITED = "the cluster had no room to start 2 workers for 10 s\nhint: submit the same command again"


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nodes that are preempted as they are put in here."""
    monkeypatch.setattr(preemption, "node_names", sorted)
    return []


def watching(leaving: list[str]) -> PreemptionState:
    state = PreemptionState()
    state.watch(lambda: leaving)
    return state


def written(result: Exception | None = None) -> futures.Future[None]:
    writing: futures.Future[None] = futures.Future()
    if result is None:
        writing.set_result(None)
    else:
        writing.set_exception(result)
    return writing


def test_a_node_that_is_preempted_requests_a_checkpoint_until_a_checkpoint_is_written(
    leaving, caplog, monkeypatch
):
    known = watching(leaving)
    assert not known.checkpoint_requested()
    known.track(written(), step=5)
    leaving.append("a")
    assert known.checkpoint_requested(), "at once, however fresh the last one is"
    writing: futures.Future[None] = futures.Future()
    known.track(writing, step=7)
    assert not known.checkpoint_requested()
    assert caplog.messages == []
    writing.set_result(None)
    assert not known.checkpoint_requested()
    assert caplog.messages == ["node a is going away: checkpoint written at step 7"]
    monkeypatch.setattr(preemption, "FRESH_SECONDS", 0.0)
    assert known.checkpoint_requested(), "what is trained until the node goes is worth another one"
    leaving.append("b")
    known.track(written(), step=9)
    known.track(written(), step=11)
    assert caplog.messages[1:] == ["node b is going away: checkpoint written at step 9"]


def test_a_checkpoint_that_was_not_written_is_still_requested(leaving, caplog):
    known = watching(leaving)
    leaving.append("a")
    known.track(written(OSError("no space left")), step=7)
    cancelled: futures.Future[None] = futures.Future()
    known.track(cancelled, step=8)
    cancelled.cancel()
    assert known.checkpoint_requested()
    assert caplog.messages == []


def test_the_controller_gets_a_checkpoint_by_asking_again(leaving):
    known = watching(leaving)
    assert not known.request_for_resize()
    assert known.checkpoint_requested()
    assert not known.request_for_resize()
    known.track(written(), step=3)
    assert not known.checkpoint_requested()
    assert known.request_for_resize()


def test_what_rays_watcher_has_told_a_worker_is_read_without_a_barrier(monkeypatch):
    told = SimpleNamespace(preemption_info=None)
    context = SimpleNamespace(preemption_context=told)
    monkeypatch.setattr(ray_internals, "get_train_context", lambda: context)
    assert ray_internals.find_preempted_nodes() == []
    told.preemption_info = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"b": [1]})
    assert ray_internals.find_preempted_nodes() == ["b"]


# The policy


class ToyPolicy(ElasticPolicy):
    """With reservations that a test makes up and no coordinator."""

    def __init__(self, num_workers: str) -> None:
        scaling = ScalingSettings(num_workers=num_workers)
        rules = ElasticRules(scaling, ONE_CPU, wait_seconds=10.0)
        super().__init__(plan_scaling(scaling, ONE_CPU), rules)
        self.reserved: dict[str, dict[str, float]] = {}

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return self.reserved


@pytest.fixture
def staying(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """The nodes of the cluster that will not be taken away."""
    nodes: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(
        policy_module,
        "read_nodes",
        lambda: [ClusterNode(id, "", resources) for id, resources in nodes.items()],
    )
    return nodes


class ToyClock:
    """Time passes only while somebody sleeps."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ToyClock:
    toy = ToyClock()
    monkeypatch.setattr(policy_module, "time", toy)
    monkeypatch.setattr(ray_internals, "time", toy)
    return toy


def test_a_range_of_workers_is_asked_for_as_one_and_a_number_as_it_is():
    assert plan_scaling(ScalingSettings(num_workers="2:8"), ONE_CPU).num_workers == (2, 8)
    assert plan_scaling(ScalingSettings(num_workers=3), ONE_CPU).num_workers == 3


@pytest.mark.parametrize(
    ("nodes", "reserved", "count"),
    [
        ({"a": 2}, {"a": 2}, 1),  # one CPU is for reading
        ({"a": 2, "b": 2}, {"a": 2, "b": 2}, 2),
        ({"a": 64}, {"a": 4}, 4),
        ({"a": 64}, {"a": 9}, 4),  # the greatest number
        ({"a": 8}, {"a": 1}, 1),  # another run has the rest
        ({"a": 8}, {"b": 1}, 4),  # b is gone, or will be: another place may do for its reservation
        ({"a": 8}, {"a": 1, "b": 1}, 4),
        ({}, {"b": 2}, 0),
    ],
)
def test_workers_are_counted_beside_their_readers_on_nodes_that_stay(
    staying, nodes, reserved, count
):
    staying |= {name: {"CPU": cpus} for name, cpus in nodes.items()}
    policy = ToyPolicy("1:4")
    assert (
        policy._count_possible_workers({name: {"CPU": cpus} for name, cpus in reserved.items()})
        == count
    )


def decisions(policy: ToyPolicy) -> Iterator[Any]:
    while True:
        yield policy.make_decision_for_non_running_worker_group()


def test_a_run_without_room_waits_so_long_and_ends_incomplete(staying, clock):
    policy = ToyPolicy("2:4")
    waiting = decisions(policy)
    for _ in range(11):
        assert isinstance(next(waiting), NoopDecision)
    assert clock.now == 111.0
    with pytest.raises(IncompleteError, match=WAITED) as caught:
        next(waiting)
    assert caught.value.exit_code == 4


def test_a_group_that_runs_ends_the_wait_and_a_start_that_fails_does_not(staying, clock):
    policy = ToyPolicy("2:4")
    policy.reserved = room = {"a": {"CPU": 4.0}}
    waiting = decisions(policy)
    for _ in range(3):
        clock.sleep(100.0)
        for _ in range(8):
            assert isinstance(next(waiting), NoopDecision)
        staying |= room
        assert next(waiting).num_workers == 2
        policy.after_controller_state_update(None, RunningState())
        staying.clear()
    staying |= room
    assert next(waiting).num_workers == 2
    clock.sleep(60.0)  # it does not run
    with pytest.raises(IncompleteError, match="no room to start 2 workers"):
        next(waiting)


def test_a_resize_waits_for_a_checkpoint_and_no_longer(staying, monkeypatch):
    is_checkpointed = iter([False, False, True])
    monkeypatch.setattr(ray_internals, "_has_checkpoint", lambda state: next(is_checkpointed))
    policy = ToyPolicy("1:4")
    policy.reserved = {"a": {"CPU": 4.0}}
    staying |= {"a": {"CPU": 8.0}}
    group = SimpleNamespace(start_time=float("-inf"), num_workers=2)
    looks = [policy.make_decision_for_running_worker_group(group, None) for _ in range(3)]
    assert [isinstance(look, ResizeDecision) for look in looks] == [False, False, True]
    assert looks[2].num_workers == 4


def test_a_group_of_the_number_that_fits_is_left_alone(staying, monkeypatch):
    monkeypatch.setattr(ray_internals, "_has_checkpoint", lambda state: pytest.fail("asked"))
    policy = ToyPolicy("1:4")
    policy.reserved = {"a": {"CPU": 2.0}}
    staying |= {"a": {"CPU": 4.0}}
    group = SimpleNamespace(start_time=float("-inf"), num_workers=2)
    decision = policy.make_decision_for_running_worker_group(group, None)
    assert isinstance(decision, NoopDecision)


# How it ends


def test_what_ends_a_run_for_want_of_workers_is_incomplete():
    ended = ray.train.ControllerError(IncompleteError("no room", hint="again"))
    found = find_cause(pickle.loads(pickle.dumps(ended)))  # noqa: S301  as Ray does
    assert str(found) == "no room\nhint: again"
    assert found.exit_code == 4
    for error in (
        ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)),
        ray.train.PreemptionError(PreemptionInfo(None, {"a": [0]})),
    ):
        assert find_cause(error) is None
        assert find_lack_of_workers(error).exit_code == 4
    assert find_lack_of_workers(ray.train.WorkerGroupError("lost", {})) is None
    assert find_lack_of_workers(ray.train.ControllerError(KeyError())) is None


def test_a_run_that_is_not_elastic_has_no_requests():
    state = PreemptionState()
    state.track(written(), step=3)
    assert not state.checkpoint_requested()
