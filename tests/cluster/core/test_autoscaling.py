"""What an autoscaler may still bring, read from where it is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cnnray.cluster.core.autoscaling import (
    REPORTED,
    read_autoscaler,
    read_config,
    read_on_head,
)
from cnnray.cluster.core.kuberay import parse_ray_cluster, read_ray_cluster
from cnnray.cluster.core.nodes import (
    NO_AUTOSCALER,
    Autoscaler,
    ClusterNode,
    NodeGroup,
    promised_nodes,
    read_nodes,
)

ROOT = Path(__file__).parents[3]
GPU_NODE = {"CPU": 8, "GPU": 1}
OURS = Autoscaler((NodeGroup("head", {"CPU": 4}, 0), NodeGroup("gpu", GPU_NODE, 8)), 8)


def node(resources: dict[str, float], *, group: str = "") -> ClusterNode:
    return ClusterNode("id", group, resources)


HEAD = node({"CPU": 4.0, "node:__internal_head__": 1.0}, group="head")


def test_our_cluster_yaml_promises_its_gpu_nodes():
    assert read_config(ROOT / "cluster.yaml") == OURS
    assert promised_nodes(OURS, [HEAD]) == ([GPU_NODE] * 8, 8)


@pytest.mark.parametrize("group", ["gpu", "node_0123"])  # by the v2 autoscaler, by v1
def test_nodes_that_have_come_are_promised_no_more(group):
    there = [HEAD, *[node({"CPU": 8.0, "GPU": 1.0, "memory": 1e9}, group=group)] * 3]
    assert promised_nodes(OURS, there) == ([GPU_NODE] * 5, 5)


def test_a_cluster_has_no_more_nodes_than_its_own_limit():
    groups = NodeGroup("small", {"CPU": 2}, 5), NodeGroup("large", {"CPU": 8}, 5)
    there = [HEAD, node({"CPU": 2.0}, group="small")]
    promised, most = promised_nodes(Autoscaler(groups, 6), there)
    assert (len(promised), most) == (9, 5)


@pytest.mark.parametrize("text", ["", "- a", "{", "max_workers: 3", "available_node_types: 1"])
def test_a_configuration_that_cannot_be_read_promises_nothing_and_is_named(text, tmp_path, caplog):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert read_config(path) is NO_AUTOSCALER
    assert caplog.messages[0].startswith("cannot read the autoscaler's configuration: ")


def test_the_autoscaler_of_the_same_ray_is_found_among_the_processes(tmp_path):
    def start(number: int, *words: str) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "cmdline").write_bytes("\0".join([*words, ""]).encode())

    config = f"--autoscaling-config={ROOT / 'cluster.yaml'}"
    start(1, "init")
    start(2, "monitor.py", "--gcs-address=1.2.3.4:1", config)
    start(3, "monitor.py", "--gcs-address=1.2.3.4:2")
    assert read_on_head("head:1", processes=tmp_path) == OURS
    assert read_on_head("head:2", processes=tmp_path) is NO_AUTOSCALER


@pytest.mark.ray
def test_a_local_ray_has_its_node_and_no_autoscaler(ray_session):
    (only,) = read_nodes()
    assert only.is_head
    assert only.resources["CPU"] == 2
    assert read_autoscaler([only]) is NO_AUTOSCALER


@pytest.mark.ray
def test_what_a_platform_has_reported_to_ray_is_promised(ray_session):
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    groups = [
        NodeGroupConfig(name="gpu", resources={"CPU": 8, "GPU": 1}, max_count=2),
        NodeGroupConfig(name="cpu", resources={"CPU": 4}, max_count=-1),
    ]
    reported = ClusterConfig(node_group_configs=groups).SerializeToString()
    client = internal_kv_get_gcs_client()
    client.internal_kv_put(REPORTED[0], reported, True, REPORTED[1])
    try:
        found = read_autoscaler(read_nodes())
    finally:
        client.internal_kv_del(REPORTED[0], False, REPORTED[1])
    assert found.groups[0] == NodeGroup("gpu", GPU_NODE, 2)
    assert found.max_nodes == 2 + found.groups[1].max_nodes > 100


@pytest.mark.ray
def test_the_place_of_that_report_is_ray_s():
    from ray import _raylet

    key, namespace = REPORTED
    assert key.decode() == _raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY
    assert namespace.decode() == _raylet.GCS_AUTOSCALER_STATE_NAMESPACE


# KubeRay


def ray_cluster(*, scales: bool = True) -> dict[str, Any]:
    def group(name: str, resources: dict[str, Any], **values: Any) -> dict[str, Any]:
        container = {"name": "ray", "resources": resources}
        template = {"spec": {"containers": [container]}}
        return {"groupName": name, "maxReplicas": 3, "template": template, **values}

    small = group("small", {"limits": {"cpu": "3500m", "memory": "8Gi"}})
    gpu = group("gpu", {"requests": {"cpu": 8}, "limits": {"nvidia.com/gpu": "2"}}, numOfHosts=2)
    given = group("given", {"limits": {"cpu": "9"}}, rayStartParams={"num-cpus": "1"})
    return {"spec": {"enableInTreeAutoscaling": scales, "workerGroupSpecs": [small, gpu, given]}}


def test_the_groups_of_a_ray_cluster_have_the_limits_of_their_pods():
    assert parse_ray_cluster(ray_cluster()) == Autoscaler(
        (
            NodeGroup("small", {"CPU": 4.0, "GPU": 0.0}, 3),
            NodeGroup("gpu", {"CPU": 8.0, "GPU": 2.0}, 6),
            NodeGroup("given", {"CPU": 1.0, "GPU": 0.0}, 3),
        ),
        12,
    )


def test_a_ray_cluster_that_does_not_scale_promises_nothing():
    assert parse_ray_cluster(ray_cluster(scales=False)) is NO_AUTOSCALER


def test_a_ray_cluster_that_may_not_be_read_promises_nothing_and_is_named(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    assert read_ray_cluster() is NO_AUTOSCALER
    assert caplog.messages == []
    monkeypatch.setenv("RAY_CLUSTER_NAME", "photos")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    assert read_ray_cluster() is NO_AUTOSCALER
    assert caplog.messages[0].startswith("cannot read the RayCluster photos of this pod: ")
