"""The nodes that a cluster has, and those that it may still get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.experimental.internal_kv import internal_kv_get_gcs_client

HEAD_RESOURCE = "node:__internal_head__"

Resources = Mapping[str, float]
"""What a node has in all, by Ray's names: CPU, GPU, object_store_memory and others."""


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive and is not being drained."""

    id: str
    group: str  # the name that the autoscaler gave it, if it gave one
    resources: Resources

    @property
    def is_head(self) -> bool:
        """Whether this is the cluster's head, which no autoscaler starts."""
        return HEAD_RESOURCE in self.resources


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind, which an autoscaler starts and stops."""

    name: str
    resources: Resources
    max_nodes: int


@dataclass(frozen=True)
class Autoscaler:
    """What a cluster may grow to."""

    groups: tuple[NodeGroup, ...] = ()
    max_nodes: int = 0  # of all groups, without the head


NO_AUTOSCALER = Autoscaler()


def read_nodes() -> list[ClusterNode]:
    """The nodes that are alive, without those that are being drained."""
    # Ray knows the state of its nodes with every autoscaler, and without one.
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    state = get_cluster_resource_state(internal_kv_get_gcs_client())
    return [
        ClusterNode(node.node_id.hex(), node.ray_node_type_name, dict(node.total_resources))
        for node in state.node_states
        if node.status in (NodeStatus.RUNNING, NodeStatus.IDLE)
    ]


def promised_nodes(
    autoscaler: Autoscaler, nodes: Sequence[ClusterNode]
) -> tuple[list[Resources], int]:
    """The resources of every node that may still join, and how many of them may join at most."""
    workers = [node for node in nodes if not node.is_head]
    names = {group.name for group in autoscaler.groups}
    promised: list[Resources] = []
    for group in autoscaler.groups:
        present = sum(
            node.group == group.name
            # Nodes of the v1 autoscaler do not carry the name of their group.
            or (node.group not in names and _is_alike(node.resources, group.resources))
            for node in workers
        )
        promised += [group.resources] * max(0, group.max_nodes - present)
    return promised, max(0, autoscaler.max_nodes - len(workers))


def _is_alike(one: Resources, other: Resources) -> bool:
    return all(one.get(name, 0.0) == other.get(name, 0.0) for name in ("CPU", "GPU"))
