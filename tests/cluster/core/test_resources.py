"""What fits a cluster, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

import cnnray.cluster.core.resources as resources_module
from cnnray.cluster.core.resources import WorkerResources, plan_workers
from cnnray.config import ScalingSettings
from cnnray.errors import SettingsError

Nodes = list[dict[str, float]]


def cpus(*counts: float) -> Nodes:
    return [{"CPU": count} for count in counts]


def gpus(count: int, *, head: float = 4.0, beside: float = 8.0) -> Nodes:
    """A head without a GPU, and nodes of one each."""
    return [{"CPU": head}, *({"CPU": beside, "GPU": 1.0} for _ in range(count))]


def plan(monkeypatch: pytest.MonkeyPatch, nodes: Nodes, **scaling: Any) -> WorkerResources:
    monkeypatch.setattr(resources_module, "node_resources", lambda: nodes)
    return plan_workers(ScalingSettings(**scaling))


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
    ],
)
def test_workers_are_planned_for_half_of_the_cpus(monkeypatch, num_workers, nodes, planned):
    resources = plan(monkeypatch, nodes, num_workers=num_workers)
    assert (resources.num_workers, resources.cpus) == planned
    assert resources.fitting(nodes) >= resources.num_workers


@pytest.mark.parametrize(
    ("nodes", "planned"),
    [
        (gpus(1), (1, 6.0)),
        (gpus(2), (2, 5.0)),
        (gpus(8), (4, 8.0)),
        (gpus(1, head=64.0), (1, 8.0)),  # of the node with the GPU, whatever the head has
    ],
)
def test_on_gpus_there_are_as_many_workers_as_gpus(monkeypatch, nodes, planned):
    resources = plan(monkeypatch, nodes, num_workers="1:4", use_gpu=True)
    assert (resources.num_workers, resources.cpus) == planned


def test_only_when_not_even_the_least_number_fits_a_job_is_refused(monkeypatch):
    for num_workers in (3, "3:8"):
        with pytest.raises(SettingsError, match="3 workers of 1 CPUs and 1 CPU to read data need"):
            plan(monkeypatch, cpus(2, 1), num_workers=num_workers, cpus_per_worker=1.0)
        with pytest.raises(SettingsError, match="3 workers need 3 GPUs, the cluster has 2"):
            plan(monkeypatch, gpus(2), num_workers=num_workers, use_gpu=True)
    fitting = plan(monkeypatch, cpus(2, 1), num_workers="2:8", cpus_per_worker=1.0)
    assert fitting.num_workers == 2


def test_workers_that_fit_another_cluster_leave_room_to_read_there_too(monkeypatch):
    own_share = plan(monkeypatch, cpus(4, 4), num_workers="1:8")
    assert [own_share.fitting(cpus(*[4] * nodes)) for nodes in (0, 1, 2, 3)] == [0, 2, 4, 6]
    given = plan(monkeypatch, cpus(4, 4), num_workers="1:8", cpus_per_worker=0.3)
    assert [given.fitting(cpus(*[4] * nodes)) for nodes in (0, 1, 2)] == [0, 10, 23]
    on_gpus = plan(monkeypatch, gpus(2), num_workers="1:8", use_gpu=True)
    assert [on_gpus.fitting(gpus(nodes)) for nodes in (0, 1, 2, 8)] == [0, 1, 2, 8]
