"""What a cluster's autoscaler may still bring.

Ray 2.60 has no call that says so. The autoscaler's configuration does: a platform may have reported
it to Ray, ``ray up`` leaves it in a file on the head, and KubeRay's is the RayCluster resource.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
import yaml
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cnnray.cluster.core.kuberay import read_ray_cluster
from cnnray.cluster.core.nodes import NO_AUTOSCALER, Autoscaler, ClusterNode, NodeGroup

logger = logging.getLogger(__name__)

NO_LIMIT = 1000
"""Nodes that are reckoned with in a group without a limit."""
REPORTED = b"__autoscaler_cluster_config", b"__autoscaler"
"""Key and namespace of what a platform has reported, in Ray's own store."""
ANSWER_SECONDS = 60.0
"""Time for the head to answer, which includes the start of a worker process there."""


def read_autoscaler(nodes: Sequence[ClusterNode]) -> Autoscaler:
    """What the autoscaler of this cluster may bring: nothing where there is no autoscaler."""
    address = ray.get_runtime_context().gcs_address
    reported = _read_reported()
    if reported is not None:
        return reported
    heads = [node.id for node in nodes if node.is_head]
    if heads == [ray.get_runtime_context().get_node_id()]:
        return read_on_head(address)
    return _ask_head(heads[0], address) if heads else NO_AUTOSCALER


def _ask_head(node_id: str, address: str) -> Autoscaler:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ask = ray.remote(num_cpus=0, scheduling_strategy=there)(read_on_head)
    try:
        found: Autoscaler = ray.get(ask.remote(address), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError as error:
        logger.warning("the head does not say what its autoscaler may bring: %s", error)
        return NO_AUTOSCALER
    return found


def _read_reported() -> Autoscaler | None:
    """What a platform has reported to Ray, where Ray Data looks, too."""
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    reported = internal_kv_get_gcs_client().internal_kv_get(*REPORTED)
    if reported is None:
        return None
    groups = tuple(
        NodeGroup(
            group.name,
            dict(group.resources),
            NO_LIMIT if group.max_count < 0 else group.max_count,
        )
        for group in ClusterConfig.FromString(reported).node_group_configs
    )
    return Autoscaler(groups, sum(group.max_nodes for group in groups))


def read_on_head(address: str, *, processes: Path = Path("/proc")) -> Autoscaler:
    """What the autoscaler of the Ray at ``address`` may bring. Runs on that Ray's head."""
    for command in _commands(processes):
        options = dict(word[2:].partition("=")[::2] for word in command if word.startswith("--"))
        # The host may be written in several ways; the port is one Ray's on this machine.
        is_ours = options.get("gcs-address", "").rpartition(":")[2] == address.rpartition(":")[2]
        if is_ours and "autoscaling-config" in options:
            return read_config(Path(options["autoscaling-config"]).expanduser())
    return read_ray_cluster()


def _commands(processes: Path) -> Iterator[list[str]]:
    """The command line of every process, on systems that have /proc."""
    for path in processes.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has just ended
            yield path.read_bytes().decode(errors="replace").split("\0")


def read_config(path: Path) -> Autoscaler:
    """What a cluster.yaml allows, with the defaults of ``ray up``."""
    try:
        config = yaml.safe_load(path.read_bytes())
        limit, head = config["max_workers"], config["head_node_type"]
        groups = tuple(
            NodeGroup(
                name,
                group.get("resources", {}),
                group.get("max_workers", 0 if name == head else limit),
            )
            for name, group in config["available_node_types"].items()
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        logger.warning("cannot read the autoscaler's configuration: %r", error)
        return NO_AUTOSCALER
    return Autoscaler(groups, limit)
