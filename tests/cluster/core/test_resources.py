"""What fits a cluster, what fits it once it grows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cnnray.cluster.core.resources import (
    Capacity,
    PoolPlan,
    WorkerPlan,
    plan_pool,
    plan_split_pools,
    plan_trials,
    plan_workers,
    pool_bundles,
    worker_bundles,
)
from cnnray.config import InferenceScalingSettings, ScalingSettings
from cnnray.errors import SettingsError

Nodes = tuple[dict[str, float], ...]


def cpus(*counts: float) -> Nodes:
    return tuple({"CPU": count} for count in counts)


def gpus(count: int, *, head: float = 4.0, beside: float = 8.0) -> Nodes:
    """A head without a GPU, and nodes of one each."""
    return ({"CPU": head}, *({"CPU": beside, "GPU": 1.0} for _ in range(count)))


def growing(nodes: Nodes, promised: Nodes, *, max_more: int = 100) -> Capacity:
    return Capacity(nodes, promised, max_more)


def plan(nodes: Nodes | Capacity, **scaling: Any) -> WorkerPlan:
    capacity = nodes if isinstance(nodes, Capacity) else Capacity(nodes)
    return plan_workers(ScalingSettings(**scaling), capacity)


@pytest.mark.parametrize(
    ("num_workers", "nodes", "planned"),
    [
        (1, cpus(2), (1, 1.0)),
        (2, cpus(2), (2, 0.5)),  # as many as it says, though each has a part of a CPU
        ("1:2", cpus(2), (1, 1.0)),  # no more than have a whole one
        ("2:2", cpus(2), (2, 0.5)),
        ("1:2", cpus(4), (2, 1.0)),
        ("1:2", cpus(64), (2, 16.0)),
        ("2:8", cpus(8, 8, 8, 8), (8, 2.0)),
        (1, cpus(2, 2, 2), (1, 2.0)),  # no more than a node has
        (2, cpus(8, 1, 1, 1, 1), (2, 3.0)),
    ],
)
def test_workers_are_planned_for_half_of_the_cpus(num_workers, nodes, planned):
    workers = plan(nodes, num_workers=num_workers)
    assert (workers.num_workers, workers.cpus) == planned
    assert workers.fitting(nodes) >= workers.num_workers


@pytest.mark.parametrize(
    ("nodes", "planned"),
    [
        (gpus(1), (1, 6.0)),
        (gpus(2), (2, 5.0)),
        (gpus(8), (4, 8.0)),
        (gpus(1, head=64.0), (1, 8.0)),  # of the node with the GPU, whatever the head has
    ],
)
def test_on_gpus_there_are_as_many_workers_as_gpus(nodes, planned):
    workers = plan(nodes, num_workers="1:4", use_gpu=True)
    assert (workers.num_workers, workers.cpus) == planned


def test_only_when_not_even_the_least_number_fits_a_job_is_refused():
    for num_workers in (3, "3:8"):
        with pytest.raises(SettingsError, match="3 workers of 1 CPUs and 1 CPU to read data need"):
            plan(cpus(2, 1), num_workers=num_workers, cpus_per_worker=1.0)
        with pytest.raises(SettingsError, match="3 workers need 3 GPUs, the cluster has 2"):
            plan(gpus(2), num_workers=num_workers, use_gpu=True)
    assert plan(cpus(2, 1), num_workers="2:8", cpus_per_worker=1.0).num_workers == 2


def test_workers_that_fit_another_cluster_leave_room_to_read_there_too():
    own_share = plan(cpus(4, 4), num_workers="1:8")
    assert [own_share.fitting(cpus(*[4] * nodes)) for nodes in (0, 1, 2, 3)] == [0, 2, 4, 6]
    given = plan(cpus(4, 4), num_workers="1:8", cpus_per_worker=0.3)
    assert [given.fitting(cpus(*[4] * nodes)) for nodes in (0, 1, 2)] == [0, 10, 23]
    on_gpus = plan(gpus(2), num_workers="1:8", use_gpu=True)
    assert [on_gpus.fitting(gpus(nodes)) for nodes in (0, 1, 2, 8)] == [0, 1, 2, 8]


# A cluster that can grow


def test_workers_share_a_cpu_only_where_the_cluster_cannot_grow_to_one_for_each():
    assert plan(growing(cpus(2), cpus(1)), num_workers=2).cpus == 0.5
    with pytest.raises(SettingsError, match=r"need 3 CPUs, the cluster has 2 on 1 nodes"):
        plan(growing(cpus(2), cpus(1, 1)), num_workers=2)
    assert plan(cpus(2, 1, 1), num_workers=2).cpus == 1.0


def test_what_the_autoscaler_is_asked_for_makes_the_plan_fit():
    cases: list[tuple[dict[str, Any], Nodes]] = [
        ({"num_workers": 1}, cpus(1, 1)),
        ({"num_workers": 4}, cpus(1, 1, 2, 4)),
        ({"num_workers": "2:8", "cpus_per_worker": 3.0}, cpus(1, 3, 3)),
        ({"num_workers": 2, "use_gpu": True}, gpus(2, head=1.0, beside=1.0)),
    ]
    for scaling, nodes in cases:
        asked = worker_bundles(ScalingSettings(**scaling))
        assert sum(bundle["CPU"] for bundle in asked) <= sum(node["CPU"] for node in nodes)
        assert plan(nodes, **scaling).num_workers >= 1


def test_a_cluster_grows_by_its_largest_nodes_and_by_no_more_than_it_may():
    capacity = growing(cpus(1), (*cpus(2, 4), {"CPU": 64.0, "GPU": 1.0}), max_more=2)
    assert capacity.grow(1, {"CPU": 1.0}).nodes == cpus(1, 4)
    assert capacity.largest({"CPU": 1.0}).nodes == cpus(1, 4, 2), "a GPU is not started in vain"
    for_gpus = capacity.largest({"GPU": 1.0})
    assert for_gpus.nodes == (*cpus(1), {"CPU": 64.0, "GPU": 1.0}, *cpus(4))
    assert (for_gpus.grown, for_gpus.max_more) == (2, 0)


def test_a_refusal_says_what_the_cluster_can_grow_to():
    largest = growing(gpus(0), gpus(2)[1:]).largest({"GPU": 1.0})
    with pytest.raises(SettingsError, match="3 workers need 3 GPUs, the cluster can grow to 2"):
        plan(largest, num_workers=3, use_gpu=True)
    with pytest.raises(SettingsError, match="3 workers of .* the cluster can grow to hold 2"):
        plan_pool(InferenceScalingSettings(num_workers=3, use_gpu=True), largest)


@pytest.mark.parametrize(
    ("num_workers", "nodes", "promised", "planned"),
    [
        (None, cpus(4), (), (4, 4)),
        (None, cpus(4), cpus(2, 2), (4, 8)),
        (None, cpus(4), gpus(2)[1:], (4, 4)),
        (3, cpus(4), cpus(2, 2), (3, 3)),
        ("1:32", cpus(4), (), (4, 4)),
        ("1:32", cpus(4), cpus(2, 2), (4, 8)),
        ("2:3", cpus(4), cpus(2, 2), (3, 3)),
        ("2:6", cpus(4), cpus(2, 2), (4, 6)),
    ],
)
def test_a_pool_begins_with_what_fits_and_may_have_what_is_promised(
    num_workers, nodes, promised, planned
):
    pool = plan_pool(InferenceScalingSettings(num_workers=num_workers), growing(nodes, promised))
    assert (pool.min_workers, pool.max_workers) == planned


def test_a_pool_that_does_not_fit_now_is_refused_though_it_will_fit():
    for num_workers in (5, "5:9"):
        scaling = InferenceScalingSettings(num_workers=num_workers)
        with pytest.raises(SettingsError, match="5 workers of 1 CPU do not fit: .* room for 4"):
            plan_pool(scaling, growing(cpus(4), cpus(4)))
    with pytest.raises(SettingsError, match="1 workers of 1 CPU and 1 GPU do not fit"):
        plan_pool(InferenceScalingSettings(use_gpu=True), growing(cpus(4), gpus(2)[1:]))


@pytest.mark.parametrize(
    ("scaling", "capacity", "decoders", "predictors"),
    [
        ({}, growing(cpus(4), ()), (3, 3), (1, 1)),
        ({}, growing(cpus(4), cpus(2)), (3, 5), (1, 1)),
        ({"num_workers": "2:3"}, growing(cpus(4), cpus(4)), (2, 5), (2, 3)),
        ({"use_gpu": True}, growing(gpus(1), gpus(1)[1:]), (11, 18), (1, 2)),
        ({"use_gpu": True, "num_workers": 1}, growing(gpus(1), gpus(1)[1:]), (11, 19), (1, 1)),
    ],
)
def test_split_pools_share_the_cpus(scaling, capacity, decoders, predictors):
    found = plan_split_pools(InferenceScalingSettings(**scaling), capacity, decode_workers=None)
    assert [(pool.min_workers, pool.max_workers) for pool in found] == [decoders, predictors]


def test_pools_ask_for_what_they_begin_with():
    assert pool_bundles([PoolPlan(2, 9, 1.0, 0.0), PoolPlan(1, 1, 0.0, 1.0)]) == [
        {"CPU": 1.0},
        {"CPU": 1.0},
        {"GPU": 1.0},
    ]


@pytest.mark.parametrize(
    ("scaling", "nodes", "concurrent", "shares"),
    [
        ({}, cpus(2), 1, 1.0),
        ({}, cpus(8), 4, 1.0),
        ({"num_workers": 2}, cpus(8), 2, 1.0),
        ({"cpus_per_worker": 2.0}, cpus(8), 2, 2.0),
        ({}, cpus(64), 5, 6.0),  # there are no more trials
        ({"use_gpu": True}, gpus(2), 2, 5.0),
        ({"num_workers": 4}, cpus(2), 1, 0.25),
    ],
)
def test_as_many_trials_run_as_leave_each_worker_its_share(scaling, nodes, concurrent, shares):
    found, each = plan_trials(
        ScalingSettings(**scaling), Capacity(nodes), trials=5, concurrent=None
    )
    assert (found, each.cpus_per_worker) == (concurrent, shares)


def test_a_trial_that_does_not_fit_is_refused():
    scaling = ScalingSettings(num_workers=2, use_gpu=True)
    with pytest.raises(SettingsError, match="2 workers need 2 GPUs, the cluster has 1"):
        plan_trials(scaling, Capacity(gpus(1)), trials=5, concurrent=None)
