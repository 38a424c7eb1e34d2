"""Whom a job may join: no Ray on the network that takes code from anybody; what fits a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest

import cnnray.cluster.runtime as runtime
from cnnray.cluster.runtime import (
    WorkerResources,
    plan_workers,
    refuse_open_cluster,
    stop_on_sigterm,
)
from cnnray.config import PackSettings, ScalingSettings, load_settings
from cnnray.errors import IncompleteError, SettingsError

Nodes = list[dict[str, float]]

LOOPBACK = ("127.0.0.1:6379", "127.8.9.1:6379", "localhost:6379", "[::1]:6379", "ray://[::1]:10001")
NETWORK = (
    "10.0.0.5:6379",
    "0.0.0.0:6379",
    "192.0.2.2:6379",
    "[fd00::2]:6379",
    "ray://head:10001",
    "head.example:6379",
    "localhost.example:6379",
    "127.0.0.1.example:6379",
    "head",
)
"""The third is what a job in ``ray job submit`` finds in RAY_ADDRESS."""


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": ""}, {"RAY_AUTH_MODE": "disabled"}])
@pytest.mark.parametrize("address", NETWORK)
def test_a_ray_on_the_network_without_a_token_is_refused_with_a_remedy(address, environment):
    with pytest.raises(SettingsError) as caught:
        refuse_open_cluster(address, environment, trusted_network=False)
    said, remedy = str(caught.value).splitlines()
    assert said.startswith(f"Ray at {address} asks for no token")
    assert "RAY_AUTH_MODE=token" in remedy
    assert "--cluster.trusted_network" in remedy
    assert caught.value.exit_code == 2


def test_a_token_in_a_file_counts_only_where_the_mode_says_so():
    # Ray itself looks for the file when it is given no address, and then sets the mode.
    with pytest.raises(SettingsError):
        refuse_open_cluster(NETWORK[0], {"RAY_AUTH_TOKEN": "a" * 64}, trusted_network=False)


@pytest.mark.parametrize("mode", ["token", "TOKEN"])
@pytest.mark.parametrize("address", NETWORK)
def test_a_ray_with_a_token_is_joined(address, mode):
    refuse_open_cluster(address, {"RAY_AUTH_MODE": mode}, trusted_network=False)


@pytest.mark.parametrize("address", LOOPBACK)
def test_a_ray_on_loopback_is_joined(address):
    refuse_open_cluster(address, {}, trusted_network=False)


def test_a_network_that_is_trusted_needs_no_token():
    flags = ["--input=i", "--output=o", "--cluster.trusted_network"]
    settings = load_settings(PackSettings, flags)
    for address in NETWORK:
        refuse_open_cluster(address, {}, trusted_network=settings.cluster.trusted_network)
    assert PackSettings(input="i", output="o").cluster.trusted_network is False


def cpus(*counts: float) -> Nodes:
    return [{"CPU": count} for count in counts]


def gpus(count: int, *, head: float = 4.0, beside: float = 8.0) -> Nodes:
    """A head without a GPU, and nodes of one each."""
    return [{"CPU": head}, *({"CPU": beside, "GPU": 1.0} for _ in range(count))]


def plan(monkeypatch: pytest.MonkeyPatch, nodes: Nodes, **scaling: Any) -> WorkerResources:
    monkeypatch.setattr(runtime, "node_resources", lambda: nodes)
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


def test_a_stop_gets_through_a_library_that_goes_on_after_any_exception():
    def work() -> None:
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the stop was swallowed")

    with pytest.raises(IncompleteError, match="stopped by SIGTERM"), stop_on_sigterm():
        work()


def test_an_interrupt_stays_an_interrupt():
    with pytest.raises(KeyboardInterrupt), stop_on_sigterm():
        raise KeyboardInterrupt
