"""The worker groups of a RayCluster, the Kubernetes resource that KubeRay's autoscaler works from.

The service account of the head's pod may read it, since the autoscaler runs in that pod.
"""

from __future__ import annotations

import json
import logging
import math
import os
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnray.cluster.core.nodes import NO_AUTOSCALER, Autoscaler, NodeGroup

logger = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER_SECONDS = 10.0


def read_ray_cluster() -> Autoscaler:
    """What the autoscaler of this pod's RayCluster may bring; nothing outside of one."""
    name, host = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("KUBERNETES_SERVICE_HOST")
    if name is None or host is None:
        return NO_AUTOSCALER
    port = os.environ.get("KUBERNETES_SERVICE_PORT_HTTPS", "443")
    try:
        return parse_ray_cluster(_get_ray_cluster(f"https://{host}:{port}", name))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        logger.warning("cannot read the RayCluster %s of this pod: %r", name, error)
        return NO_AUTOSCALER


def _get_ray_cluster(server: str, name: str) -> dict[str, Any]:
    namespace = (ACCOUNT / "namespace").read_text().strip()
    token = (ACCOUNT / "token").read_text().strip()
    request = urllib.request.Request(
        f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayclusters/{name}",
        headers={"Authorization": f"Bearer {token}"},
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS, context=trust) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def parse_ray_cluster(document: Mapping[str, Any]) -> Autoscaler:
    """The groups of a RayCluster; nothing where its autoscaler is not switched on."""
    spec = document["spec"]
    if not spec.get("enableInTreeAutoscaling"):
        return NO_AUTOSCALER
    groups = tuple(map(_parse_group, spec.get("workerGroupSpecs", [])))
    return Autoscaler(groups, sum(group.max_nodes for group in groups))


def _parse_group(group: Mapping[str, Any]) -> NodeGroup:
    """A node's resources are those that Ray is started with, or else the limits of its pod."""
    container = group["template"]["spec"]["containers"][0].get("resources", {})
    pod = {**container.get("requests", {}), **container.get("limits", {})}
    options = group.get("rayStartParams", {})
    gpus = [amount for name, amount in pod.items() if name.endswith("gpu")]
    amounts = {
        "CPU": options.get("num-cpus", pod.get("cpu", 0)),
        "GPU": options.get("num-gpus", gpus[0] if gpus else 0),
        **group.get("resources", {}),
    }
    resources = {name: _parse_quantity(amounts[name]) for name in ("CPU", "GPU")}
    nodes = group.get("maxReplicas", 0) * group.get("numOfHosts", 1)
    return NodeGroup(group["groupName"], resources, nodes)


def _parse_quantity(amount: float | str) -> float:
    """A Kubernetes quantity (4, "4" or "3500m"), rounded up as Ray does."""
    text = str(amount)
    return float(math.ceil(float(text[:-1]) / 1000 if text.endswith("m") else float(text)))
